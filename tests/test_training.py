"The loop's promises: where a run stands, parts of a batch, half precision, callbacks."
import functools
import os

import pytest
import torch

from diffusion_model.callbacks import (
    Callback, DrawSamples, LearningRate, Log, SaveCheckpoints, StopEarly, Validate)
from diffusion_model.checkpoint import list_checkpoints, load_checkpoint
from diffusion_model.cli import sample_command
from diffusion_model.config import ConfigError, load_config
from diffusion_model.dataset import create_loader
from diffusion_model.generation import load_network
from diffusion_model.objective import spread_uniform
from diffusion_model.tracking import read_metrics, read_status
from diffusion_model.training import Trainer

SMALL = {"base_channels": 8, "norm_groups": 4, "attention_resolutions": "[]",
         "channel_multipliers": "[1]", "num_res_blocks": 1, "image_size": 8, "batch_size": 6,
         "max_steps": 40, "train_size": 90, "device": "cpu", "horizontal_flip": "true",
         "dropout": 0.1, "progress": "false", "warmup_steps": 5}


def small(folder, **change):
    return load_config("quickstart", SMALL | {"output_dir": str(folder)} | change)


def test_status(tmp_path):
    class Stop(Callback):
        def after_step(self, trainer, metrics):
            assert read_status(trainer.run_dir)["state"] == "running"
            trainer.stop = trainer.step == 2
    Trainer(small(tmp_path/"a"), callbacks=[Stop()]).fit()
    assert {"state": "stopped", "step": 2, "max_steps": 40,
            "pid": os.getpid()}.items() <= read_status(
        tmp_path/"a").items()
    Trainer(small(tmp_path/"b", max_steps=1), callbacks=[]).fit()
    assert read_status(tmp_path/"b")["state"] == "finished"
    assert read_status(tmp_path/"nowhere") == {}
    (tmp_path/"b"/"status.json").write_text('{"half')
    assert read_status(tmp_path/"b") == {}


@pytest.mark.parametrize("parts", [2, 3, 4, 6])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, parts):
    def gradient(accumulation):
        trainer = Trainer(small(tmp_path, accumulation=accumulation, dropout=0, max_grad_norm=0),
                          callbacks=[])
        told = trainer.train_step(create_loader(trainer.datasets.train, 6, seed=0).at(0))
        return torch.cat([p.grad.flatten() for p in trainer.objective.averaged.parameters()]), told
    (whole, told), (sum_, told_of_parts) = gradient(1), gradient(parts)
    torch.testing.assert_close(sum_, whole, rtol=1e-4, atol=1e-6)
    assert told_of_parts["loss"] == pytest.approx(told["loss"], rel=1e-5)


def test_more_parts_than_images(tmp_path):
    with pytest.raises(ConfigError,
                       match="training.accumulation: found 7; at most training.batch_size = 6"):
        small(tmp_path, accumulation=7)


def test_fp16_halves_a_scale_that_is_too_large_and_keeps_it(tmp_path):
    trainer = Trainer(small(tmp_path, precision="fp16"), callbacks=[])
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.**40)
    batch = create_loader(trainer.datasets.train, 6, seed=0).at(0)
    before = [p.clone() for p in trainer.objective.averaged.parameters()]
    told = trainer.train_step(batch)
    scale = trainer.scaler.get_scale()
    assert scale < 2.**40 and trainer.step == 1 and told["grad_norm"] < 1e4
    assert all(p.isfinite().all() for p in trainer.objective.averaged.parameters())
    now = trainer.objective.averaged.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, now))
    trainer.save()
    again = Trainer(small(tmp_path, precision="fp16"), callbacks=[])
    again.resume(tmp_path)
    assert again.scaler.get_scale() == scale


def test_nan_in_fp16_is_an_error_not_a_loop(tmp_path):
    trainer = Trainer(small(tmp_path, precision="fp16"), callbacks=[])
    batch = create_loader(trainer.datasets.train, 6, seed=0).at(0)
    batch.images[2] = torch.nan
    before = [p.clone() for p in trainer.objective.averaged.parameters()]
    with pytest.raises(FloatingPointError,
                       match=r"step 0: the loss is not finite .*samples 2 \(image \d+\)"):
        trainer.train_step(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.objective.averaged.parameters()))


def test_epochs_are_counted_in_steps(tmp_path):
    trainer = Trainer(small(tmp_path, epochs=1.5), callbacks=[SaveCheckpoints(100)])
    # 1.5 × 90/6, rounded up
    assert trainer.cfg.training.max_steps == 23 and trainer.fit().step == 23
    # a resumed run can be told to go further
    more = load_config(tmp_path/"config.yaml", {"max_steps": 25})
    again = Trainer(more, callbacks=[])
    again.resume(tmp_path)
    assert again.fit().step == 25


def test_a_callback_can_set_the_learning_rate(tmp_path):
    class Rates(Callback):
        def begin(self, trainer): self.seen = []
        def after_step(self, trainer, metrics): self.seen.append(metrics["lr"])
    rates = Rates()
    Trainer(small(tmp_path, max_steps=4), callbacks=[LearningRate(lambda step: 0.1/(1 + step)),
                                                     rates]).fit()
    assert rates.seen == [0.1, 0.1/2, 0.1/3, 0.1/4]


class Told(Callback):
    "Validation losses that were decided beforehand."
    def __init__(self, losses): self.losses = losses
    def after_step(self, trainer, metrics):
        trainer.validation = trainer.step, self.losses[trainer.step - 1]


def test_early_stopping_waits_for_its_patience_and_remembers_it(tmp_path):
    losses = [3, 2, 2.5, 1, 1, 2, 0.5, 3, 3, 3]
    run = Trainer(small(tmp_path/"a"), callbacks=[Told(losses), StopEarly(3)]).fit()
    assert run.step == 10 and read_status(tmp_path/"a")["state"] == "stopped"
    first = Trainer(small(tmp_path/"b", max_steps=8),
                    callbacks=[Told(losses), StopEarly(3), SaveCheckpoints(100)]).fit()
    assert first.step == 8
    second = Trainer(small(tmp_path/"b"), callbacks=[Told([0]*8 + [3, 3]), StopEarly(3),
                                                     SaveCheckpoints(100)])
    second.resume(tmp_path/"b")
    assert second.fit().step == 10  # one was bad before the stop, two after it


def test_the_best_is_kept_besides_the_newest(tmp_path):
    losses = [5, 4, 1, 3, 3, 3, 3, 3, 2, 3]
    Trainer(small(tmp_path, max_steps=10, keep_checkpoints=2),
            callbacks=[Told(losses), SaveCheckpoints(2, best=True)]).fit()
    assert [int(p.name[5:]) for p in list_checkpoints(tmp_path)] == [3, 8, 10]
    assert load_checkpoint(tmp_path, best=True).step == 3 and load_checkpoint(tmp_path).step == 10
    again = Trainer(small(tmp_path, max_steps=11, keep_checkpoints=2),
                    callbacks=[Told([0]*10 + [1.5]), SaveCheckpoints(2, best=True)])
    again.resume(tmp_path)
    again.fit()  # 1.5 is not better than the best of the run's first life
    assert load_checkpoint(tmp_path, best=True).step == 3
    assert sample_command(["--checkpoint", str(tmp_path), "--best", "--steps", "2", "--num_samples",
                           "1", "--output_dir", str(tmp_path/"out")]) == 0
    assert (tmp_path/"out"/"grid.png").exists()


def test_several_averages_are_saved_resumed_and_sampled_from(tmp_path):
    more = {"ema_more": "[0.5]", "max_steps": 12, "lr_schedule": "constant", "warmup_steps": 0}
    straight = Trainer(small(tmp_path/"a", **more), callbacks=[SaveCheckpoints(100)]).fit()
    Trainer(small(tmp_path/"b", **more | {"max_steps": 7}), callbacks=[SaveCheckpoints(100)]).fit()
    resumed = Trainer(small(tmp_path/"b", **more), callbacks=[])
    resumed.resume(tmp_path/"b")
    resumed.fit()
    assert list(straight.emas) == ["ema", "ema_0.5"]
    for name in straight.emas:
        a, b = (t.emas[name].state_dict() for t in (straight, resumed))
        assert all(torch.equal(a[k], b[k]) for k in a), name
    network, _ = load_network(tmp_path/"a", ema="ema_0.5")
    own = straight.emas["ema_0.5"].network.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in network.state_dict().items())


def test_validation_is_the_same_every_time_and_told_by_quarters(tmp_path):
    trainer = Trainer(small(tmp_path, validation_size=64), callbacks=[])
    def validate():
        with trainer.averaged() as objective:
            return list(objective.validate(trainer.datasets.validation, trainer.world).values())
    loss, *quarters = validate()
    assert [loss, *quarters] == validate()
    counts = torch.bincount((4*spread_uniform(0, torch.arange(64))).long(), minlength=4)
    assert loss == pytest.approx(float((torch.tensor(quarters)*counts).sum()/64), rel=1e-5)
    trainer.train_step(trainer.loader.at(0))
    assert validate()[0] != loss


def test_what_callbacks_do_changes_no_step(tmp_path):
    "Validating, drawing and saving leave the weights as they would have been, dropout included."
    quiet = Trainer(small(tmp_path/"a", max_steps=6), callbacks=[]).fit()
    busy = Trainer(small(tmp_path/"b", max_steps=6, num_samples=2, steps=2, validation_size=8),
                   callbacks=[
        Log(1), Validate(2), DrawSamples(2), SaveCheckpoints(1)]).fit()
    for a, b in zip(quiet.objective.parameters(), busy.objective.parameters()):
        assert torch.equal(a, b)
    assert [m["step"] for m in read_metrics(tmp_path/"b") if "validation_loss" in m] == [2, 4, 6]


def test_a_compiled_network_takes_the_same_step(tmp_path, monkeypatch):
    "Traced, but not built by a C++ compiler (minutes): tested is that the trainer uses it rightly."
    built, quick = [], functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda *a, **k: built.append(a) or quick(*a, **k))
    plain, compiled = (Trainer(small(tmp_path, compile=c, dropout=0), callbacks=[])
                       for c in ("false", "true"))
    assert len(built) == 1
    batch = plain.loader.at(0)
    told = [t.train_step(batch) for t in (plain, compiled)]
    assert told[0]["loss"] == pytest.approx(told[1]["loss"], rel=1e-4)
    for a, b in zip(plain.objective.parameters(), compiled.objective.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)
    states = [t.objective.averaged.state_dict() for t in (plain, compiled)]
    assert list(states[0]) == list(states[1])  # no prefix in its checkpoints
