"Faults of the loop, its objective and its callbacks that were found and mended."
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from devices import apple
from torch import nn

from diffusion_model import processes
from diffusion_model.callbacks import (
    Callback, DrawSamples, Log, SaveCheckpoints, StopEarly, Validate, default_callbacks, remind)
from diffusion_model.checkpoint import list_checkpoints, load_checkpoint
from diffusion_model.config import ConfigError, load_config
from diffusion_model.tracking import read_metrics
from diffusion_model.training import Trainer

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = {"base_channels": 8, "norm_groups": 4, "attention_resolutions": "[]", "steps": 2,
         "channel_multipliers": "[1]", "num_res_blocks": 1, "image_size": 8, "batch_size": 6,
         "max_steps": 6, "train_size": 90, "validation_size": 12, "device": "cpu", "dropout": 0.1,
         "progress": "false", "warmup_steps": 5, "num_samples": 4, "log_every": 1,
         "optimizer": "adamw", "learning_rate": 2e-3}


def small(folder, **change):
    exact = {"output_dir": str(folder), "precision": "fp32"}
    return load_config("quickstart", SMALL | exact | change)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.objective.parameters()])


class Do(Callback):
    "Something of our own after each step."
    def __init__(self, do, order=None):
        self.do = do
        if order is not None: self.order = order

    def after_step(self, trainer, metrics): self.do(trainer)


# 3: parameters without a gradient
class Partly(nn.Module):
    "One layer learns, one is frozen, one is never asked."
    def __init__(self):
        super().__init__()
        self.learns, self.frozen, self.unused = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.frozen.requires_grad_(False)

    def forward(self, x, time, cond): return self.learns(self.frozen(x))


@pytest.mark.mended(3)
def test_layers_that_are_frozen_or_unused_stay_as_they_are(tmp_path):
    trainer = Trainer(small(tmp_path), callbacks=[SaveCheckpoints(3)], network=Partly())
    network = trainer.objective.averaged
    before = {n: p.clone() for n, p in network.named_parameters()}
    trainer.fit()
    moved = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"learns.weight", "learns.bias"}
    again = Trainer(small(tmp_path, max_steps=8), callbacks=[], network=Partly())
    again.resume(tmp_path)
    assert torch.equal(weights(again), weights(trainer)) and again.fit().step == 8


# 5, 11: a device without float64, and how often a step waits for it
@pytest.fixture
def mps(monkeypatch):
    "The emulated device, where `auto` would find it; the list of operations that waited for it."
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "_is_in_bad_fork", lambda: True)
    monkeypatch.setattr(torch.mps, "manual_seed", torch.default_generator.manual_seed)
    waits = []
    with apple(waits): yield waits


@pytest.mark.mended(5)
@pytest.mark.parametrize("change", [
    {}, {"schedule": "linear", "prediction": "eps", "loss_weighting": "min_snr"},
    {"schedule": "ve", "prediction": "edm", "timestep_sampling": "log_normal",
     "loss_weighting": "edm"}, {"timestep_sampling": "logit_normal"}])
def test_a_device_without_float64_trains_validates_draws_and_resumes(tmp_path, mps, change):
    here = Trainer(small(tmp_path/"cpu", dropout=0, max_steps=2, **change), callbacks=[])
    there = Trainer(small(tmp_path/"mps", device="mps", dropout=0, max_steps=2, **change),
                    callbacks=[SaveCheckpoints(1)])
    assert there.objective.averaged.conv_in.weight.device.type == "mps"
    losses = [[t.train_step(t.loader.at(step))["loss"] for step in (0, 1)] for t in (here, there)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    found = []
    for trainer in (here, there):  # the trained weights: an emulated tensor cannot lend its own
        found.append(trainer.objective.eval().validate(trainer.datasets.validation, trainer.world))
        images, _ = trainer.objective.draw(2)
        assert images.shape == (2, 3, 8, 8) and images.device.type == "cpu"
    assert found[0]["validation_loss"] == pytest.approx(found[1]["validation_loss"], rel=1e-4)


@pytest.mark.mended(11)
def test_a_step_waits_for_its_device_once(tmp_path, mps):
    none_is_clipped = small(tmp_path, device="mps", max_grad_norm=100)
    trainer = Trainer(none_is_clipped, callbacks=[])
    trainer.train_step(trainer.loader.at(0))
    batch = trainer.loader.at(1)
    mps.clear()
    trainer.train_step(batch)
    assert len(mps) == 1, mps


# 6: dropout is seeded on the run's device
@pytest.mark.mended(6)
def test_dropout_is_seeded_on_the_device_of_the_run(monkeypatch):
    cards = [SimpleNamespace(number=i) for i in range(3)]
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "default_generators", cards)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    device = lambda name: processes.device_generator(torch.device(name))
    assert device("cuda:1") is cards[1] and device("cuda:2") is cards[2]
    assert device("cuda") is cards[0] and device("cpu") is torch.default_generator


# 7: the validation loss is the training loss on held-out data
@pytest.mark.mended(7)
def test_the_validation_loss_is_weighted_like_the_training_loss(tmp_path):
    found = []
    for weighting in ("uniform", "sigmoid"):
        trainer = Trainer(small(tmp_path, loss_weighting=weighting), callbacks=[])
        held = trainer.datasets.validation
        with trainer.averaged() as objective:
            found.append(objective.validate(held, trainer.world)["validation_loss"])
            batch = held.batch(torch.arange(12))
            losses = torch.stack([objective.loss(batch._replace(positions=batch.positions + 12*i))
                                  for i in range(400)])
        assert found[-1] == pytest.approx(losses.mean().item(), rel=0.05)
    assert abs(found[0]/found[1] - 1) > 0.2


# 8: other data than the run has seen
@pytest.mark.mended(8)
@pytest.mark.parametrize("change, says", [
    ({"data.mean": 0.4}, "data.mean: was 0.5"), ({"data.std": 0.25}, "data.std: was 0.5"),
    ({"channels": 1}, "data.channels: was 3"), ({"train_size": 80}, "90 images then, 80 now"),
    ({"data_seed": 7}, "data")])
def test_a_run_keeps_its_data(tmp_path, change, says):
    Trainer(small(tmp_path), callbacks=[SaveCheckpoints(6)]).fit()
    again = Trainer(small(tmp_path, max_steps=9, **change), callbacks=[])
    with pytest.raises(ConfigError, match=says): again.resume(tmp_path)
    if "train_size" not in change: return
    again = Trainer(small(tmp_path, max_steps=9, if_changed="accept", **change), callbacks=[])
    again.resume(tmp_path)
    assert any("80 now" in note for note in again.notes) and again.fit().step == 9


# 9: two callbacks of one class, and the order of the list
@pytest.mark.mended(9)
def test_two_callbacks_of_one_class_keep_their_own_memory(tmp_path):
    losses = iter([3., 2., 4., 5., 6., 7.])
    told = Do(lambda trainer: setattr(trainer, "validation", (trainer.step, next(losses))))
    first = [StopEarly(5), told, StopEarly(50), SaveCheckpoints(4)]
    Trainer(small(tmp_path, max_steps=4), callbacks=first).fit()
    first[0].state["best"] = -1.  # what another memory would hold
    then = [StopEarly(50), SaveCheckpoints(9), StopEarly(5)]
    memory = load_checkpoint(tmp_path).trainer["callbacks"]
    memory["StopEarly(patience=5)"]["best"] = 1.5
    remind(then, memory)
    assert (then[0].state, then[2].state) == ({"best": 2., "waited": 2}, {"best": 1.5, "waited": 2})


@pytest.mark.mended(9)
def test_the_order_of_the_list_changes_nothing(tmp_path):
    def run(name, reverse):
        cfg = small(tmp_path/name, validate_every=2, patience=2, learning_rate=1e-9, max_steps=20,
                    sample_every=4, checkpoint_every=3)
        listed = default_callbacks(cfg)
        trainer = Trainer(cfg, callbacks=listed[::-1] if reverse else listed).fit()
        timed = ("images_per_second", "data_wait")
        rows = [{k: v for k, v in m.items() if k not in timed}
                for m in read_metrics(trainer.run_dir)]
        saved = [(p.name, (p/"model.safetensors").read_bytes(), load_checkpoint(p).score)
                 for p in list_checkpoints(trainer.run_dir)]
        memory = load_checkpoint(trainer.run_dir).trainer["callbacks"]
        return trainer.step, rows, saved, memory, sorted(os.listdir(trainer.run_dir/"samples"))
    assert run("listed", False) == run("reversed", True)


# 16: what was trained is saved, whatever else fails
class Fails(Callback):
    def __init__(self, moment, order):
        self.moment, self.order = moment, order

    def after_step(self, trainer, metrics):
        if self.moment == "step" and trainer.step == 4: raise ValueError("a bad image")

    def end(self, trainer):
        if self.moment == "end": raise OSError("no room for a picture")


@pytest.mark.mended(16)
@pytest.mark.parametrize("order", range(5))
def test_a_step_is_saved_even_where_a_callback_fails_after_it(tmp_path, order):
    trainer = Trainer(small(tmp_path), callbacks=[Fails("step", order), Log(1), SaveCheckpoints(4)])
    with pytest.raises(ValueError, match="a bad image"): trainer.fit()
    assert load_checkpoint(tmp_path).step == 4
    again = Trainer(small(tmp_path), callbacks=[Log(1), SaveCheckpoints(4)])
    again.resume(tmp_path)
    whole = Trainer(small(tmp_path/"whole"), callbacks=[Log(1)]).fit()
    assert torch.equal(weights(again.fit()), weights(whole))
    losses = [[m["loss"] for m in read_metrics(t.run_dir)] for t in (again, whole)]
    assert losses[0] == losses[1]


@pytest.mark.mended(16)
@pytest.mark.parametrize("order", range(5))
def test_a_picture_that_cannot_be_drawn_at_the_end_is_a_warning(tmp_path, order):
    trainer = Trainer(small(tmp_path), callbacks=[Fails("end", order), SaveCheckpoints(100)])
    if order == SaveCheckpoints.order:
        with pytest.raises(OSError): trainer.fit()
        return
    with pytest.warns(UserWarning, match="Fails failed at the end .* no room for a picture"):
        trainer.fit()
    assert load_checkpoint(tmp_path).step == 6


@pytest.mark.mended(16)
def test_one_bad_validation_image_costs_no_step(tmp_path):
    cfg = small(tmp_path, validate_every=3, checkpoint_every=3)
    trainer = Trainer(cfg, callbacks=[Validate(3), SaveCheckpoints(3), DrawSamples(3)])
    def broken(*_): raise ValueError("x.png: not a readable image")
    trainer.datasets.validation.batch = broken
    with pytest.raises(ValueError, match=r"x\.png"): trainer.fit()
    assert load_checkpoint(tmp_path).step == 3


COMMAND = "import sys; from diffusion_model.cli import train_command as c; sys.exit(c())"


@pytest.fixture
def started(tmp_path, background):
    "A long run in a process of its own, once it has made some steps."
    def start(**options):
        change = {"output_dir": tmp_path, "max_steps": 10**6}
        words = [f"--{k}={v}" for k, v in (SMALL | change).items()]
        process = background(
            [sys.executable, "-c", COMMAND, "--config=quickstart", *words], text=True, **options,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        metrics, until = tmp_path/"metrics.jsonl", time.time() + 120
        while time.time() < until and process.poll() is None:
            if metrics.exists() and len(metrics.read_text()) > 300: break
            time.sleep(0.05)
        return process
    return start


@pytest.mark.mended(16)
def test_a_closed_terminal_saves(tmp_path, started):
    process = started()
    process.send_signal(signal.SIGHUP)
    printed, complained = process.communicate(timeout=60)
    assert process.returncode == 129, complained
    step = int(re.search(r"stopped at step (\d+), and saved", printed)[1])
    assert load_checkpoint(tmp_path).step == step


@pytest.mark.mended(16)
def test_nohup_still_means_that_a_closed_terminal_is_nothing(started):
    process = started(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143


# 21: processes that do not belong to one run
@pytest.mark.mended(21)
def test_a_trainer_says_what_its_run_is_to_the_other_processes(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(processes.World, "agree", lambda self, **values: asked.update(values))
    trainer = Trainer(small(tmp_path), callbacks=[]).fit()
    assert (asked["seed"], asked["steps"], asked["step"]) == (0, 6, 0)
    assert asked["data"] == trainer.data and list(asked["weights"]) == ["model"]
