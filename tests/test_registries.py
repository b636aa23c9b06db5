"One of each: what a user adds in a dozen lines trains, resumes and samples through the commands."
from typing import Literal

import pytest
import torch
from pydantic import BaseModel
from torch import nn

from diffusion_model import (
    callbacks, checkpoint, cli, dataset, networks, objective, sampler, scheduler, space, tracking)
from diffusion_model.transforms import create_transform

WORDS = ["--max_steps=6", "--batch_size=4", "--image_size=8", "--device=cpu", "--progress=false",
         "--log_every=1", "--checkpoint_every=3", "--validate_every=3", "--sample_every=6",
         "--num_samples=3", "--steps=2", "--guidance_scale=1", "--horizontal_flip=false"]


class ToyConfig(BaseModel):
    name: Literal["toy"] = "toy"
    width: int = 4

    def check(self, shape): return [] if self.width < 99 else ["model.width: found 99"]


class ToyNetwork(nn.Module):
    def __init__(self, width, channels):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, width, 1), nn.SiLU(),
                                    nn.Conv2d(width, channels, 1))

    def forward(self, x, time, cond): return self.layers(x)


class ToySchedule(scheduler.FlowSchedule):
    "Noise that comes later."
    def alpha_sigma(self, t): return 1 - t.double()**2, t.double()**2
    def t_of_log_snr(self, l): return torch.sigmoid(-l/2)**0.5


class Halves(space.Space):
    "A space of half the values, and one number more a pixel."
    range = None

    def __init__(self, data): self.shape = (data.channels + 1, data.image_size, data.image_size)
    def encode(self, images): return torch.cat([images, images[:, :1]], 1)/2
    def decode(self, x): return space.to_uint8(2*x[:, :-1])


def grey_pictures(data):
    "Twelve pictures without labels, each of one grey."
    pictures = torch.arange(12).repeat_interleave(3*data.image_size**2).to(torch.uint8)*20
    source = dataset.ArraySource(pictures.view(12, 3, data.image_size, data.image_size), None)
    parts = [dataset.ImageSet(source, create_transform(data, train), torch.arange(a, b))
             for train, a, b in ((True, 0, 8), (False, 8, 10), (False, 10, 12))]
    return dataset.Datasets(*parts, None)


class Twice(objective.Diffusion):
    def loss(self, batch): return 2*super().loss(batch)


class Count(callbacks.Callback):
    def __init__(self): self.state = {"steps": 0}
    def after_step(self, trainer, metrics): self.state = {"steps": self.state["steps"] + 1}


def nearly_there(step): return step.there.alpha*step.pred.x0 + step.there.sigma*step.pred.eps


TOYS = {
    "network": (networks.NETWORKS, networks.Network(
        ToyConfig, lambda model, shape: ToyNetwork(model.width, shape[0])), ["--model.name=toy"]),
    "solver": (sampler.SOLVERS, sampler.Solver(nearly_there), ["--solver=toy"]),
    "schedule": (scheduler.SCHEDULES, lambda diffusion: ToySchedule(), ["--schedule=toy"]),
    "space": (space.SPACES, Halves, ["--data.space=toy"]),
    "data set": (dataset.DATASETS, grey_pictures, ["--dataset=toy"]),
    "objective": (objective.OBJECTIVES, Twice, ["--training.objective=toy"]),
    "callback": (callbacks.CALLBACKS, lambda cfg: Count(), ["--logging.callbacks=[toy]"])}
SMALL = ["--base_channels=8", "--norm_groups=4", "--attention_resolutions=[]",
         "--channel_multipliers=[1]", "--num_res_blocks=1"]


@pytest.mark.parametrize("kind", [*TOYS, "all"])
def test_a_toy_of_each_trains_resumes_and_samples(kind, tmp_path, monkeypatch):
    words = ["--config=quickstart", *WORDS]
    for registry, entry, choice in TOYS.values() if kind == "all" else [TOYS[kind]]:
        monkeypatch.setitem(registry, "toy", entry)
        words += choice
    if kind not in ("network", "all"): words += SMALL
    if kind == "data set": words.append("--num_classes=0")
    if kind in ("network", "all"): words.append("--train_size=100")
    train = lambda out, *more: cli.train_command([*words, f"--output_dir={tmp_path/out}", *more])
    assert train("whole") == 0
    assert train("parts", "--max_steps=3", "--lr_schedule=constant", "--warmup_steps=0") == 0
    assert cli.train_command(["--resume", str(tmp_path/"parts"), "--max_steps=6"]) == 0
    first, then = (tracking.read_metrics(tmp_path/out) for out in ("whole", "parts"))
    assert [m["step"] for m in then if "loss" in m] == [1, 2, 3, 4, 5, 6]
    assert first[0]["loss"] == then[0]["loss"]
    out = tmp_path/"drawn"
    assert cli.sample_command(["--checkpoint", str(tmp_path/"parts"), "--num_samples=3",
                               "--output_dir", str(out)]) == 0
    assert len(list(out.glob("0000*.png"))) == 3
    if kind in ("callback", "all"):
        memory = checkpoint.load_checkpoint(tmp_path/"parts").trainer["callbacks"]
        assert memory["Count"] == {"steps": 6}


def test_a_checkpoint_of_an_unregistered_network_says_how_to_register_it(
        tmp_path, monkeypatch, capsys):
    registry, entry, choice = TOYS["network"]
    with monkeypatch.context() as within:
        within.setitem(registry, "toy", entry)
        assert cli.train_command(["--config=quickstart", *WORDS, *choice, "--train_size=100",
                                  f"--output_dir={tmp_path}"]) == 0
    capsys.readouterr()
    for command, words in ((cli.train_command, ["--resume", str(tmp_path), "--max_steps=9"]),
                           (cli.sample_command, ["--checkpoint", str(tmp_path)])):
        assert command(words) == 2
        said = capsys.readouterr().err
        assert "'toy'" in said and "known are unet" in said and "NETWORKS['toy'] = " in said


class Regression(objective.Objective):
    "The radius of a figure from its picture, by its share of coloured pixels: no diffusion at all."
    def __init__(self, cfg, datasets, network=None):
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Dropout(0.1), nn.SiLU(),
                                     nn.Linear(8, 1))

    def loss(self, batch):
        wanted = batch.images.std((1, 2, 3))
        return (self.network(batch.images)[:, 0] - wanted).square()


def test_an_objective_without_diffusion_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setitem(objective.OBJECTIVES, "toy", Regression)
    words = ["--config=quickstart", *WORDS, *SMALL, "--train_size=100", "--lr_schedule=constant",
             "--warmup_steps=0", "--training.objective=toy", "--learning_rate=0.01"]
    run = lambda out, steps: cli.train_command(
        [*words, f"--max_steps={steps}", f"--output_dir={tmp_path/out}"])
    assert run("whole", 20) == 0 and run("parts", 7) == 0
    assert cli.train_command(["--resume", str(tmp_path/"parts"), "--max_steps=20"]) == 0
    checkpoint.wait_for_checkpoints()
    newest = [tmp_path/out/"checkpoints"/"step_00000020" for out in ("whole", "parts")]
    for name in ("model.safetensors", "ema.safetensors"):
        assert (newest[0]/name).read_bytes() == (newest[1]/name).read_bytes()
    rows = [[(m["step"], m.get("loss"), m.get("validation_loss"))
             for m in tracking.read_metrics(tmp_path/out)] for out in ("whole", "parts")]
    validated = [m for m in rows[0] if m[2] is not None]
    assert validated[-1][2] < validated[0][2]
    losses = [[m for m in part if m[1] is not None] for part in rows]
    assert losses[0] == losses[1]
    assert not (tmp_path/"whole"/"samples").exists()  # nothing to draw
