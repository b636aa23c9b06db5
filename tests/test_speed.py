"What is chosen for speed: by the device, checked, kept on resuming, and not seen in what is drawn."
import warnings
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_training import SMALL
from torch import nn

from diffusion_model import speed
from diffusion_model.checkpoint import load_checkpoint, wait_for_checkpoints
from diffusion_model.config import load_config
from diffusion_model.denoiser import Denoiser
from diffusion_model.dit import DiT
from diffusion_model.generation import generate, load_denoiser
from diffusion_model.scheduler import FlowSchedule
from diffusion_model.speed import for_drawing, give_back
from diffusion_model.training import Trainer
from diffusion_model.unet import RESAMPLERS, Given, UNet, halve, timestep_embedding


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


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("kind", [UNet, DiT])
def test_what_is_told_of_a_time_is_kept_and_the_same(kind, classes):
    torch.manual_seed(0)
    made = network(num_classes=classes) if kind is UNet else DiT(
        width=32, depth=2, heads=2, num_classes=classes).eval()
    for p in made.parameters(): nn.init.normal_(p, std=0.1)
    fast = for_drawing(made)
    fast.tell.room, x = 3, torch.randn(2, 3, 16, 16)
    for t in ([7., 7.], [7., 8.], [8., 8.], [7., 7.], [9., 9.], [10., 10.], [7., 7.]):
        for labels in ([2, 2], [2, -1], [0, 0]) if classes else (None,):
            cond = () if labels is None else (torch.tensor(labels),)
            with torch.no_grad():
                answer, there = (f(x, torch.tensor(t), *cond) for f in (fast, made))
            assert (answer - there).abs().max() <= 1e-4*there.abs().max()
        assert 1 <= len(fast.tell.known) <= 3
    asked = mock.Mock(wraps=fast.tell.answer)
    fast.tell.answer = asked
    with torch.no_grad(): fast(x, torch.tensor(t), *cond)
    assert not asked.called
    made.train()(x, torch.zeros(2), *cond).sum().backward()  # and the original still learns
    assert all(p.grad is not None for p in made.parameters())


def test_weights_that_were_joined_are_given_back_and_no_others(monkeypatch):
    given, made = [], network()
    monkeypatch.setattr(speed, "give_back", lambda weight: given.append(weight.data_ptr()))
    for_drawing(made)
    assert {made.mid1.time_proj.weight.data_ptr(), made.ups[0].upsample.conv.weight.data_ptr()} \
        <= {*given}
    assert not {p.data_ptr() for p in made.time_mlp.parameters()} & {*given}


def test_blocks_of_ones_own_are_told_as_before(monkeypatch):
    class Own(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.read = nn.Linear(64, channels)

        def forward(self, x, emb): return (x + self.read(emb)[..., None, None])[..., ::2, ::2]

    usual = RESAMPLERS["pool"]
    monkeypatch.setitem(RESAMPLERS, "own", lambda parts, channels, resize:
                        Own(channels) if resize is halve else usual(parts, channels, resize))

    class Mine(UNet):
        def forward(self, x, t):
            emb = self.time_mlp(timestep_embedding(t, self.base_channels))
            return self.mid1(self.downs[0](self.conv_in(x), Given(F.silu(emb)))[0], F.silu(emb))

    hooked = network()
    hooked.mid1.time_proj.register_forward_hook(lambda *_: None)
    torch.manual_seed(0)
    mine = Mine(16, 3, 16, (1,), 1, (), norm_groups=4)
    for made in (network(resample="own"), hooked, mine.eval()):
        x, t = torch.randn(2, 3, 16, 16), torch.full((2,), 5.)
        with torch.no_grad(): there, found = made(x, t), for_drawing(made)(x, t)
        assert (found - there).abs().max() < 1e-4*there.abs().max()


def test_a_network_inside_another_is_told_by_it():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x, t):
            emb = F.silu(self.inner.time_mlp(timestep_embedding(t, 16)))
            return self.inner.downs[0](self.inner.conv_in(x), Given(emb))[0]

    made, x, t = Around().eval(), torch.randn(2, 3, 16, 16), torch.full((2,), 5.)
    with torch.no_grad(): there, found = made(x, t), for_drawing(made)(x, t)
    assert (found - there).abs().max() < 1e-4*there.abs().max()


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


def test_a_weight_that_was_given_back_is_read_again_and_what_was_changed_stays(tmp_path):
    weight = torch.randn(256, 1024)
    save_file({"w": weight}, tmp_path/"w.safetensors")
    mapped = load_file(tmp_path/"w.safetensors")["w"]
    with torch.no_grad(): mapped[7] += 1
    for w in (mapped, weight): give_back(w)
    weight[7] += 1
    assert torch.equal(mapped, weight)


def test_a_loaded_network_draws_learns_and_leaves_its_file_alone(tmp_path):
    cfg = small(tmp_path, **{"guidance_scale": 1., "sampling.steps": 2})
    trainer = Trainer(cfg, callbacks=[])
    path = trainer.save()
    wait_for_checkpoints()
    held = load_checkpoint(path)
    assert held.model  # somebody else holds them, too
    loaded = load_denoiser(held, ema=False)
    before = {k: v.clone() for k, v in loaded.network.state_dict().items()}
    generator = torch.random.get_rng_state()
    for opened in (loaded, load_denoiser(path, ema=False)):
        assert torch.equal(torch.random.get_rng_state(), generator)  # nothing was drawn to fill it
        next(generate(opened, 2, torch.arange(2)))
        assert all(torch.equal(v, before[k]) for k, v in opened.network.state_dict().items())
        for p in opened.network.parameters(): p.data.add_(1)
        assert all(torch.equal(v, before[k]) for k, v in held.model.items())
    assert all(torch.equal(v, before[k]) for k, v in load_checkpoint(path).model.items())
