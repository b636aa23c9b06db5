"What is chosen for speed: by the device, checked, kept on resuming, and not seen in what is drawn."
import warnings

import pytest
import torch
from test_training import SMALL
from torch import nn

from diffusion_model import speed
from diffusion_model.config import load_config
from diffusion_model.denoiser import Denoiser
from diffusion_model.generation import generate
from diffusion_model.scheduler import FlowSchedule
from diffusion_model.speed import for_drawing
from diffusion_model.training import Trainer
from diffusion_model.unet import UNet


def small(folder, **change):
    return load_config("quickstart", SMALL | {"output_dir": str(folder), "device": "cpu"} | change)


@pytest.fixture
def able(monkeypatch):
    "A processor that computes in bfloat16 (any can be asked to)."
    monkeypatch.setattr(speed, "has_bf16", lambda device: True)


def test_what_is_left_open_is_the_devices(tmp_path, able):
    assert Trainer(small(tmp_path), callbacks=[]).levers == ("bf16", True, False, True)
    said = dict(precision="fp32", channels_last=False, keep_memory=False)
    assert Trainer(small(tmp_path, **said), callbacks=[]).levers == ("fp32", False, False, False)


def test_bf16_that_does_not_agree_is_not_used_and_stays_so(tmp_path, able, monkeypatch):
    monkeypatch.setattr(speed, "disagreement", lambda *_: "bf16 does not agree with fp32: a trial")
    with pytest.warns(UserWarning, match="a trial; going on in fp32"):
        trainer = Trainer(small(tmp_path, max_steps=2)).fit()
    assert trainer.levers.precision == "fp32"
    monkeypatch.undo()
    monkeypatch.setattr(speed, "has_bf16", lambda device: True)
    again = Trainer(small(tmp_path, max_steps=3))
    again.resume(tmp_path)
    assert again.levers.precision == "fp32" and again.trusted
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert again.fit().levers.precision == "fp32"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_run_keeps_its_precision(tmp_path, able, monkeypatch, precision):
    Trainer(small(tmp_path, max_steps=2, precision=precision)).fit()
    again = Trainer(small(tmp_path, max_steps=3, precision="auto"))
    again.resume(tmp_path)
    assert again.levers.precision == precision and again.trusted
    monkeypatch.setattr(speed, "has_bf16", lambda device: False)  # on another machine
    there = Trainer(small(tmp_path, max_steps=3, precision="auto"))
    there.resume(tmp_path)
    assert there.levers.precision == "fp32"


def network(**change):
    torch.manual_seed(0)
    made = UNet(16, 3, 16, (1, 2), 1, (8,), norm_groups=4, **change).eval()
    for p in made.parameters():
        if not p.any(): nn.init.normal_(p, std=0.1)
    return made


def test_drawing_in_bf16_is_close_and_leaves_the_network_alone(tmp_path):
    made = network()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    denoiser = Denoiser(made, FlowSchedule(), "v").eval()
    cfg = small(tmp_path, **{"sampling.steps": 4, "guidance_scale": 1.})
    space = Trainer(cfg, callbacks=[]).objective.space
    drawn = {}
    for precision in ("fp32", "bf16"):
        s = cfg.sampling.model_copy(update={"sample_precision": precision})
        drawn[precision] = next(generate(denoiser, 4, sampling=s, space=space)).images.float()
    assert (drawn["fp32"] - drawn["bf16"]).abs().mean() < 4 < drawn["fp32"].std()
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
    made.train()(torch.randn(2, 3, 16, 16), torch.zeros(2)).sum().backward()  # it still learns
    assert all(p.grad is not None for p in made.parameters())


@pytest.mark.parametrize("change", [
    {}, {"adaptive_norm": True, "resample": "residual"}, {"resample": "pool", "norm": "rms"},
    {"patch_size": 2}, {"num_classes": 3}])
def test_a_network_for_drawing_gives_the_same_at_any_size(change):
    made = network(**change)
    fast = for_drawing(made)
    cond = (torch.tensor([0, 2]),) if made.num_classes else ()
    with torch.no_grad():
        for size in ((16, 16), (32, 16), (16, 16)):  # packed for the first, used with others
            x, t = torch.randn(2, 3, *size), torch.tensor([3., 700.])
            there = made(x, t, *cond)
            assert (fast(x, t, *cond) - there).abs().max() < 1e-4*there.abs().max()


def test_the_check_is_without_dropout_and_leaves_the_objective_as_it_was():
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.dropout = nn.Linear(16, 16), nn.Dropout(0.9)

        def loss(self, batch): return self.dropout(self.layer(batch)).square().mean(1)

    torch.manual_seed(0)
    for mode in (True, False):
        objective = Forgetful().train(mode)
        assert speed.disagreement(objective, torch.randn(8, 16), "bf16") is None
        assert objective.training == objective.dropout.training == mode
