"The loop's promises: where a run stands, parts of a batch, half precision, callbacks."
import copy
import functools
import math
import os

import pytest
import torch

from diffusion_model.callbacks import (
    DECIDES, LOGS, MEASURES, SAVES, SHOWS, Callback, DrawSamples, LearningRate, Log,
    SaveCheckpoints, StopEarly, Validate)
from diffusion_model.checkpoint import list_checkpoints, load_checkpoint
from diffusion_model.cli import sample_command
from diffusion_model.config import ConfigError, load_config
from diffusion_model.dataset import Batch, create_loader
from diffusion_model.generation import load_network
from diffusion_model.objective import spread_uniform
from diffusion_model.optimizer import create_optimizer
from diffusion_model.tracking import read_metrics, read_status
from diffusion_model.training import Trainer

SMALL = {"base_channels": 8, "norm_groups": 4, "attention_resolutions": "[]",
         "channel_multipliers": "[1]", "num_res_blocks": 1, "image_size": 8, "batch_size": 6,
         "max_steps": 40, "train_size": 90, "device": "cpu", "horizontal_flip": "true",
         "dropout": 0.1, "progress": "false", "warmup_steps": 5,
         "optimizer": "adamw", "learning_rate": 2e-3}


def small(folder, **change):
    exact = {"output_dir": str(folder), "precision": "fp32", "sample_precision": "fp32"}
    return load_config("quickstart", SMALL | exact | change)


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


@pytest.mark.parametrize("longest", [0, 0.05, 1e3])
def test_a_step_is_what_plain_torch_does(tmp_path, longest):
    "Rate, clipping, step and every average, against a loop that knows nothing of the trainer."
    trainer = Trainer(small(tmp_path, dropout=0, max_grad_norm=longest, ema_decay=0.5,
                            ema_more="[0.9]", learning_rate=1e-2), callbacks=[])
    network = copy.deepcopy(trainer.objective)
    weights = dict(network.averaged.named_parameters())
    adam = create_optimizer(trainer.cfg.training, network)
    averages = {d: {k: w.detach().clone() for k, w in weights.items()} for d in (0.5, 0.9)}
    for step in range(4):
        batch = trainer.loader.at(step)
        told = trainer.train_step(batch)
        adam.param_groups[0]["lr"] = adam.param_groups[-1]["lr"] = 1e-2*(step + 1)/5  # warm-up
        adam.zero_grad()
        loss = network(batch).mean()
        loss.backward()
        size = torch.nn.utils.clip_grad_norm_(weights.values(), longest or math.inf)
        adam.step()
        for d, average in averages.items():
            keep = min(d, (1 + step)/(10 + step))
            for k, w in weights.items(): average[k].lerp_(w.detach(), 1 - keep)
        assert told["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert told["grad_norm"] == pytest.approx(size.item(), rel=1e-4)
        assert told["lr"] == pytest.approx(1e-2*(step + 1)/5)
    for name, d in (("ema", 0.5), ("ema_0.9", 0.9)):
        for k, w in trainer.emas[name].network.named_parameters():
            torch.testing.assert_close(w, averages[d][k], rtol=1e-3, atol=1e-5)
    for k, w in trainer.objective.averaged.named_parameters():
        torch.testing.assert_close(w, weights[k], rtol=1e-3, atol=1e-5)


def test_images_that_are_left_out_are_not_of_the_mean(tmp_path):
    "Where two of six cannot be read, the step is that of a batch of four."
    def stepped(size, **change):
        trainer = Trainer(small(tmp_path, dropout=0, batch_size=size, max_grad_norm=0),
                          callbacks=[])
        told = trainer.train_step(six.rows(slice(4)))
        return [p.grad for p in trainer.objective.averaged.parameters()], told
    six = Trainer(small(tmp_path), callbacks=[]).loader.at(0)
    (short, told), (four, told_of_four) = stepped(6), stepped(4)
    torch.testing.assert_close(short, four, rtol=1e-4, atol=1e-7)
    assert told["skipped"] == 2 and told_of_four["skipped"] == 0
    for key in ("loss", "grad_norm"): assert told[key] == pytest.approx(told_of_four[key], rel=1e-5)


def test_dropout_depends_on_the_step_and_the_part(tmp_path):
    trainer = Trainer(small(tmp_path, dropout=0.5, accumulation=2), callbacks=[])
    three = trainer.loader.at(0).rows(slice(3))
    twice = Batch(torch.cat([three.images]*2), torch.cat([three.cond]*2),
                  torch.cat([three.positions]*2))
    trainer.objective.train()
    with torch.no_grad():  # at first the network's answer is zero whatever is dropped
        for p in trainer.objective.averaged.parameters(): p.add_(0.1)
    first, again = trainer.backward(twice), trainer.backward(twice)
    assert torch.equal(first, again)
    assert not torch.allclose(first[:3], first[3:])  # the other part, of the same images
    trainer.step = 1
    assert not torch.allclose(trainer.backward(twice), first)


@pytest.mark.parametrize("precision, kind", [("fp32", None), ("bf16", torch.bfloat16)])
def test_precision_is_what_the_config_says(tmp_path, precision, kind):
    trainer, seen = Trainer(small(tmp_path, precision=precision), callbacks=[]), []
    trainer.objective.averaged.register_forward_pre_hook(lambda *_: seen.append(
        torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None))
    trainer.train_step(trainer.loader.at(0))
    assert set(seen) == {kind}


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_moves_nothing(tmp_path, value):
    trainer = Trainer(small(tmp_path), callbacks=[])
    weight = next(trainer.objective.averaged.parameters())
    weight.register_hook(lambda grad: torch.full_like(grad, value))
    before = copy.deepcopy(trainer.objective.state_dict())
    with pytest.raises(FloatingPointError, match="the gradient is not finite"):
        trainer.train_step(trainer.loader.at(0))
    assert trainer.step == 0
    for key, tensor in trainer.objective.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_what_is_judged_are_the_averaged_weights_without_dropout(tmp_path):
    trainer = Trainer(small(tmp_path, ema_decay=0.9), callbacks=[])
    for step in range(3): trainer.train_step(trainer.loader.at(step))
    def weights(network): return [p.detach().clone() for p in network.parameters()]
    own, average = weights(trainer.objective.averaged), weights(trainer.ema.network)
    assert not all(map(torch.equal, own, average))
    for training in (True, False):
        trainer.objective.train(training)
        with trainer.averaged() as judged:
            assert all(map(torch.equal, weights(judged.averaged), average))
            assert not any(m.training for m in judged.modules())
        assert all(map(torch.equal, weights(trainer.objective.averaged), own))
        assert all(m.training == training for m in trainer.objective.averaged.modules())


def test_the_seed_decides_weights_and_order(tmp_path):
    one, same, other = (Trainer(small(tmp_path, **{"training.seed": seed}), callbacks=[])
                        for seed in (1, 1, 2))
    def weights(trainer): return list(trainer.objective.averaged.parameters())
    assert all(map(torch.equal, weights(one), weights(same)))
    assert not all(map(torch.equal, weights(one), weights(other)))
    batches = [t.loader.at(0) for t in (one, same, other)]
    assert torch.equal(batches[0].images, batches[1].images)
    assert not torch.equal(batches[0].images, batches[2].images)
    for trainer, batch in zip((one, same, other), batches):
        alone = create_loader(trainer.datasets.train, 6, trainer.cfg.training.seed).at(0)
        assert torch.equal(batch.images, alone.images) and torch.equal(batch.cond, alone.cond)


def test_a_checkpoint_has_its_own_score_and_the_classes(tmp_path):
    trainer = Trainer(small(tmp_path), callbacks=[])
    trainer.step, trainer.validation = 3, (3, 0.25)
    assert load_checkpoint(trainer.save()).score == 0.25
    trainer.step = 4  # not validated again
    checkpoint = load_checkpoint(trainer.save())
    assert checkpoint.score is None and checkpoint.classes == trainer.datasets.classes != []


def test_callbacks_are_called_by_their_order_not_as_listed(tmp_path):
    called = []

    class Notes(Callback):
        def __init__(self, order): self.order = order
        def begin(self, trainer): called.append(("begin", self.order))
        def after_step(self, trainer, metrics): called.append(("step", self.order))
        def end(self, trainer): called.append(("end", self.order))
    Trainer(small(tmp_path, max_steps=1), callbacks=[
        Notes(order) for order in (SHOWS, SAVES, LOGS, DECIDES, MEASURES)]).fit()
    kinds = [LOGS, MEASURES, DECIDES, SAVES, SHOWS]
    assert called == [*(("begin", k) for k in kinds), *(("step", k) for k in kinds),
                      ("end", SAVES), *(("end", k) for k in kinds if k != SAVES)]


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


@pytest.mark.parametrize("order", [LOGS, MEASURES, SHOWS])
def test_a_step_that_was_made_is_saved_where_a_callback_fails(tmp_path, order):
    "No checkpoint is due at that step: it is saved because something failed."
    class Fails(Callback):
        def after_step(self, trainer, metrics):
            if trainer.step == 3: raise OSError("one bad image")
    fails = Fails()
    fails.order = order
    trainer = Trainer(small(tmp_path), callbacks=[fails, SaveCheckpoints(100)])
    with pytest.raises(OSError, match="one bad image"): trainer.fit()
    assert [load_checkpoint(path).step for path in list_checkpoints(tmp_path)] == [3]


def test_only_the_main_process_saves(tmp_path, monkeypatch):
    trainer = Trainer(small(tmp_path), callbacks=[])
    monkeypatch.setattr(type(trainer.world), "main", False)
    assert trainer.save() is None and not list_checkpoints(tmp_path)
