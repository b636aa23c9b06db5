"The transformer against independent formulations, with any shape and condition; by commands."
import copy, json

import pytest
import torch
import torch.nn.functional as F
from test_cli import run
from torch import nn

from diffusion_model.config import load_config
from diffusion_model.dit import (
    DiT, RotaryAttention, SwiGLU, TokenNorm, create_dit, from_patches, hidden_units, rope_angles,
    rotate, to_patches)
from diffusion_model.unet import softmax_attention
from diffusion_model.dit_config import DiTConfig
from diffusion_model.generation import load_denoiser

SMALL = dict(width=32, depth=2, heads=2, patch_size=4)
CONDITIONS = {"label": {"kind": "labels", "count": 3}, "angle": {"kind": "vector", "size": 2},
              "hints": {"kind": "tokens", "length": 4, "size": 8},
              "caption": {"kind": "text", "words": 9, "length": 5},
              "sketch": {"kind": "image", "channels": 2}}
COND = {"label": torch.tensor([1, -1]), "angle": torch.randn(2, 2), "hints": torch.randn(2, 4, 8),
        "caption": torch.tensor([[3, 4, 0, 0, 0], [2, 0, 0, 0, 0]]),
        "sketch": torch.randn(2, 2, 8, 16)}


def awake(network):
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim > 1 and not p.any(): nn.init.normal_(p, std=0.1)
    return network


def conditioned(**fields):
    return create_dit(DiTConfig(**SMALL, conditions=CONDITIONS, **fields), (3, 8, 16))


def inputs(): return torch.randn(2, 3, 8, 16), torch.tensor([3., 700.])


# -- the parts, by other formulations
def test_patches_against_unfold():
    x = torch.randn(2, 3, 12, 8)
    assert torch.equal(to_patches(x, 4), F.unfold(x, 4, stride=4).transpose(1, 2))
    assert torch.equal(from_patches(to_patches(x, 4), 4, (3, 2)), x)


def test_rope_against_complex_numbers():
    rows, columns, d = 3, 5, 24
    x, angles = torch.randn(2, 4, rows*columns + 2, d), rope_angles((rows, columns), d, extra=2)
    omega = 100**(-torch.arange(d//4, dtype=torch.float64)/(d//4))
    pairs = torch.complex(x[..., :d//2].double(), x[..., d//2:].double())
    for place in range(rows*columns):
        turn = torch.cat([place//columns*omega, place % columns*omega])
        pairs[:, :, place] *= torch.exp(1j*turn)
    theirs = torch.cat([pairs.real, pairs.imag], -1)
    assert torch.allclose(rotate(x, angles.cos(), angles.sin()).double(), theirs, atol=1e-5)


def test_swiglu_and_norm_by_the_formula():
    mlp, x = SwiGLU(8, 6), torch.randn(4, 5, 8)
    w, b = mlp.to_hidden.weight, mlp.to_hidden.bias
    gate, value = x @ w[:6].T + b[:6], x @ w[6:].T + b[6:]
    ours = mlp.to_out(gate*gate.sigmoid()*value)
    assert torch.allclose(mlp(x), ours, atol=1e-6)
    norm, theirs = TokenNorm(8), nn.RMSNorm(8, eps=1e-6)
    nn.init.normal_(norm.weight)
    theirs.load_state_dict(norm.state_dict())
    assert torch.allclose(norm(x), theirs(x), atol=1e-6)


def test_attention_against_torch():
    "Without places and norms it is torch's MultiheadAttention, mask included."
    ours, theirs = RotaryAttention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)
    ours.norm_q, ours.norm_k = nn.Identity(), nn.Identity()
    theirs.in_proj_weight, theirs.in_proj_bias = ours.to_qkv.weight, ours.to_qkv.bias
    theirs.out_proj.weight, theirs.out_proj.bias = ours.to_out.weight, ours.to_out.bias
    x, still = torch.randn(2, 6, 32), (torch.ones(6, 4), torch.zeros(6, 4))
    assert torch.allclose(ours(x, still), theirs(x, x, x)[0], atol=1e-5)
    counts = torch.tensor([[1, 1, 1, 1, 0, 1], [1, 0, 0, 1, 1, 1]]).bool()
    with_mask = theirs(x, x, x, key_padding_mask=~counts)[0]
    assert torch.allclose(ours(x, still, counts[:, None, None]), with_mask, atol=1e-5)


@pytest.mark.parametrize("words", [9, 300])
def test_attention_by_hand_has_torchs_gradients(words):
    "Where bfloat16 on a processor goes its own way: torch's answers and gradients, roughly."
    mask = torch.rand(2, 1, 1, words) < 0.7
    mask[..., 0] = True
    found = []
    for dtype, f in ((torch.bfloat16, softmax_attention),
                     (torch.float32, lambda *a: F.scaled_dot_product_attention(*a[:3], a[3]))):
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, 3, words, 8).to(dtype).requires_grad_() for _ in range(3))
        out = f(q, k, v, mask)
        (out*torch.randn(out.shape)).sum().backward()
        found.append([out, q.grad, k.grad, v.grad])
    for ours, theirs in zip(*found):
        assert (ours.float() - theirs).abs().max() < 0.04*theirs.abs().max()


@pytest.mark.parametrize("width, depth, heads, published", [
    (384, 12, 6, 33), (768, 12, 12, 130), (1024, 24, 16, 458), (1152, 28, 16, 675)])
def test_published_parameter_counts(width, depth, heads, published):
    with torch.device("meta"):
        network = DiT(4, 2, width, depth, heads, num_classes=1000)
    assert round(sum(p.numel() for p in network.parameters())/1e6) == published


def test_hidden_units():
    assert [hidden_units(w, 4) for w in (384, 768, 1024, 1152)] == [1024, 2048, 2736, 3072]
    assert hidden_units(8, 0.1) == 8


# -- the whole
@pytest.mark.parametrize("options", [
    {}, {"channels": 1}, {"channels": 5, "patch_size": 2}, {"patch_size": 8}, {"num_classes": 3},
    {"bottleneck": 4}, {"time_channels": 8}, {"dropout": 0.5}, {"gradient_checkpointing": True},
    {"mlp_ratio": 1.5}, {"depth": 1, "heads": 8}])
def test_output_has_the_input_shape(options):
    network = DiT(**{**SMALL, **options})
    y = torch.tensor([0, -1]) if network.num_classes else None
    for height, width in ((8, 8), (16, 8), (8, 24)):
        x = torch.randn(2, network.channels, height, width)
        out = network(x, torch.tensor([3., 700.]), y)
        assert out.shape == x.shape and not out.any()   # zero before training
        assert network(x, torch.tensor(3), y).shape == x.shape  # a time for all


def test_padding():
    network, t = awake(DiT(**SMALL, pad=True)).eval(), torch.tensor([3., 700.])
    x = torch.randn(2, 3, 5, 14)
    whole = F.pad(x, (0, 2, 0, 3))
    assert network(x, t).shape == x.shape
    assert torch.equal(network(x, t), network(whole, t)[..., :5, :14])


def test_rows_are_not_columns():
    "A transposed image has a transposed answer only if rows and columns were the same to it."
    network, t = awake(DiT(**SMALL)).eval(), torch.tensor([3.])
    x = torch.randn(1, 3, 16, 16)
    turned = to_patches(x, 4).unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    swapped = from_patches(turned, 4, (4, 4))           # patches transposed, their pixels not
    there = to_patches(network(swapped, t), 4).unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    assert not torch.allclose(from_patches(there, 4, (4, 4)), network(x, t), atol=1e-3)


def test_every_parameter_learns_after_two_steps():
    "All, conditions included: the head first, then gates and embedding, then the rest."
    network, (x, t) = conditioned(bottleneck=5), inputs()
    adam = torch.optim.Adam(network.parameters(), 1e-3)
    for step in range(3):
        adam.zero_grad()
        for part in range(2):  # a sample with each condition and one without
            cond = {n: c.roll(part, 0) for n, c in COND.items()}
            if part: cond |= {"angle": torch.zeros(2, 2), "hints": torch.zeros(2, 4, 8)}
            (network(x, t, cond) - x).square().mean().backward()
        idle = {n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()}
        adam.step()
        assert idle or step == 2
    assert not idle


def test_conditions_matter_and_do_not_mix():
    network, (x, t) = awake(conditioned()).eval(), inputs()
    out = network(x, t, COND)
    other = {"label": torch.tensor([2, 0]), "angle": torch.randn(2, 2),
             "hints": torch.randn(2, 4, 8), "sketch": torch.randn(2, 2, 8, 16),
             "caption": torch.tensor([[5, 6, 7, 0, 0], [3, 3, 0, 0, 0]])}
    for name, c in other.items():
        c = torch.cat([c[:1], COND[name][1:]])  # of the first sample only
        moved = (network(x, t, COND | {name: c}) - out).flatten(1).abs().amax(1)
        assert moved[0] > 1e-4 and moved[1] < 1e-5, name
    single = network(x[1:], t[1:], {n: c[1:] for n, c in COND.items()})
    assert torch.allclose(out[1:], single, atol=1e-5)
    words = torch.tensor([[3, 4, 0, 0, 0], [2, 0, 0, 0, 0]])
    assert torch.equal(network(x, t, COND | {"caption": words}), out)


def test_checkpointing_gives_the_same_gradients():
    (x, t), one = inputs(), awake(conditioned())
    two = conditioned(gradient_checkpointing=True)
    two.load_state_dict(one.state_dict())
    for network in (one, two): network(x, t, COND).square().sum().backward()
    for (name, p), q in zip(one.named_parameters(), two.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-4*p.grad.abs().max()), name


@pytest.mark.parametrize("training", [True, False])
def test_autocast_to_bfloat16(training, recwarn):
    network, (x, t) = awake(conditioned()), inputs()
    exact = network(x, t, COND)
    with torch.autocast("cpu", torch.bfloat16): out = network(x, t, COND)
    assert out.shape == x.shape and out.isfinite().all()
    assert (out.float() - exact).abs().max() < 0.05*exact.abs().max()
    assert not [w for w in recwarn if "Mismatch" in str(w.message)]
    if training:
        out.float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_a_copy_after_sampling_trains():
    "What was computed in inference mode is no obstacle, and a copy takes it along."
    network, (x, t) = awake(DiT(**SMALL)), inputs()
    with torch.inference_mode(): network(x, t)
    copy.deepcopy(network)(x, t).sum().backward()
    assert "_turns" not in "".join(network.state_dict())


def test_compiled_network_takes_several_sizes():
    "Graph capture does not trip over what is kept between calls (no compiler is needed for this)."
    network, t = awake(DiT(**SMALL)).eval(), torch.tensor([3., 700.])
    captured = torch.compile(network, backend="eager")
    for height, width in ((8, 16), (8, 16), (16, 8)):
        x = torch.randn(2, 3, height, width)
        with torch.no_grad(): assert torch.allclose(captured(x, t), network(x, t), atol=1e-5)


@pytest.mark.parametrize("x, cond, says", [
    (torch.zeros(2, 1, 8, 8), None, "takes (batch, 3, height, width)"),
    (torch.zeros(3, 8, 8), None, "takes"),
    (torch.zeros(2, 3, 8, 10), None, "the nearest: 8 or 12"),
    (torch.zeros(2, 3, 8, 2), None, "the nearest: 4"),
    (torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), "unconditional")])
def test_refusals(x, cond, says):
    with pytest.raises(ValueError) as error: DiT(**SMALL)(x, torch.zeros(2), cond)
    assert says in str(error.value)


@pytest.mark.parametrize("fields, shape, says", [
    ({"patch_size": 8}, (3, 28, 32), "choose 24 or 32"),
    ({"width": 100}, (3, 32, 32), "choose 96 or 120"),
    ({"num_classes": 3, "conditions": {"label": {"kind": "labels", "count": 3}}}, (3, 32, 32),
     "num_classes"),
    ({}, (2,), "takes images")])
def test_config_errors(fields, shape, says):
    assert any(says in line for line in DiTConfig(**fields).check(shape))


def test_from_the_command_line(tmp_path):
    "Trained for three steps, resumed, opened: the transformer by its name and fields."
    out = tmp_path/"run"
    done = run("train", "--config", "quickstart", "--model.name", "dit", "--width", "32", "--depth",
               "2", "--heads", "2", "--patch_size", "4", "--image_size", "16", "--batch_size", "4",
               "--max_steps", "3", "--steps", "2", "--num_samples", "2", "--log_every", "1",
               "--device", "cpu", "--output_dir", out)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (out/"metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == 3
    network = load_denoiser(out).network
    assert type(network) is DiT and network.patch_size == 4 and len(network.blocks) == 2
    assert load_config(out/"config.yaml").model == DiTConfig(
        width=32, depth=2, heads=2, patch_size=4, num_classes=network.num_classes)
    done = run("train", "--config", "quickstart", "--model.name", "dit", "--patch_size", "5",
               "--width", "33", "--output_dir", tmp_path/"no")
    assert done.returncode != 0 and "need a multiple of it: choose" in done.stderr + done.stdout
    assert "model.width: found 33" in done.stderr + done.stdout
