"The U-Nets against diffusers' and torch's own layers; their published sizes; what they refuse."
import copy
import re
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusion_model.condition_config import (ImageCondition, LabelCondition, TextCondition,
                                              TokenCondition, VectorCondition)
from diffusion_model.config import load_config
from diffusion_model.norms import NORMS
from diffusion_model.unet import RESAMPLERS, Attention, UNet, create_unet
from diffusion_model.unet_config import UNetConfig

PARTS = [  # ours -> diffusers', by renaming alone
    (r"^time_mlp\.0", "time_embedding.linear_1"), (r"^time_mlp\.2", "time_embedding.linear_2"),
    (r"^mid1", "mid_block.resnets.0"), (r"^mid2", "mid_block.resnets.1"),
    (r"^mid_attention", "mid_block.attentions.0"), (r"^norm_out", "conv_norm_out"),
    (r"^downs", "down_blocks"), (r"^ups", "up_blocks"), (r"downsample\.", "downsamplers.0."),
    (r"upsample\.", "upsamplers.0."), (r"time_proj", "time_emb_proj"),
    (r"shortcut", "conv_shortcut"),
    (r"(attentions\.\d+\.)norm", r"\1group_norm"), (r"to_out\.", "to_out.0.")]


def theirs(name):
    for ours, other in PARTS: name = re.sub(ours, other, name)
    return name


def reference(blocks, **options):
    "diffusers' network, with random weights."
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    down = tuple(name.replace("_", "Down") for name in blocks)
    return diffusers.UNet2DModel(**{**dict(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=2, act_fn="silu",
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
        norm_num_groups=32, attention_head_dim=None, mid_block_scale_factor=1,
        time_embedding_type="positional", center_input_sample=False, down_block_types=down,
        up_block_types=tuple(name.replace("_", "Up") for name in blocks[::-1])),
        **options}).eval()


def same_by_renaming(network, other, size):
    "With their weights, renamed, ours answers as theirs does, at several times."
    state = other.state_dict()
    renamed = {name: state.pop(theirs(name)) for name in network.state_dict()}
    assert not state, f"left over: {list(state)[:5]}"
    network.load_state_dict(renamed, strict=True)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        for t in (0, 1, 500, 999):
            torch.testing.assert_close(network(x, torch.tensor(t)), other(x, t).sample, atol=1e-5,
                                       rtol=1e-5)


def test_weights_of_ddpm_by_renaming():
    other = reference(("_Block2D", "Attn_Block2D", "_Block2D", "_Block2D"),
                      block_out_channels=(128, 256, 256, 256))
    assert count(other) == 35_746_307
    same_by_renaming(create_unet(load_config("default").model, (3, 32, 32)).eval(), other, (32, 32))


@pytest.mark.parametrize("resample, blocks, changes", [
    ("conv", ("_Block2D", "Attn_Block2D"), "conv"),
    ("residual", ("Resnet_sampleBlock2D", "Attn_Block2D"), "resnet")])
@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_weights_of_adm_by_renaming(resample, blocks, changes, size):
    "Scale and shift after the second norm, heads of 8 channels; blocks that change the resolution."
    other = reference(
        blocks, sample_size=16, attn_norm_num_groups=8,
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        resnet_time_scale_shift="scale_shift", downsample_type=changes, upsample_type=changes)
    network = UNet(size, base_channels=16, channel_multipliers=(1, 2), num_res_blocks=1,
                   norm_groups=8, attention_levels=(1,), attention_head_dim=8, adaptive_norm=True,
                   resample=resample).eval()
    same_by_renaming(network, other, size)


def count(network): return sum(p.numel() for p in network.parameters())


SMALL = dict(base_channels=8, channel_multipliers=(1, 2), norm_groups=4, num_res_blocks=1,
             attention_resolutions=())


@pytest.mark.parametrize("options", [
    {}, {"channels": 1}, {"patch_size": 2}, {"patch_size": 4}, {"num_classes": 3},
    {"image_size": 64},
    {"attention_resolutions": (32, 16), "attention_head_dim": 4}, {"channel_multipliers": (1,)},
    {"num_res_blocks": 3}, {"dropout": 0.5}])
def test_output_has_the_input_shape(options):
    network = UNet(**{**SMALL, **options})
    x = torch.randn(2, network.channels, network.image_size, network.image_size)
    y = torch.tensor([0, -1]) if network.num_classes else None
    out = network(x, torch.tensor([3., 700.]), y)
    assert out.shape == x.shape and not out.any()  # zero before training
    out = network(x, torch.tensor(3), y)           # a time for all
    assert out.shape == x.shape


def test_published_sizes_of_ddpm():
    with torch.device("meta"):
        small = create_unet(UNetConfig(), (3, 32, 32))
        large = create_unet(UNetConfig(channel_multipliers=[1, 1, 2, 2, 4, 4]), (3, 256, 256))
    assert (count(small), count(large)) == (35_746_307, 113_673_219)


def adm_count(base, multipliers, blocks, attend, classes, out):
    "ADM's parameters by its paper's description alone, layer by layer."
    def conv(a, b, k): return k*k*a*b + b
    def block(a, b):  # norm, convolution, scale and shift, norm, convolution, shortcut
        return (2*a + conv(a, b, 3) + (4*base + 1)*2*b + 2*b + conv(b, b, 3)
                + (conv(a, b, 1) if a != b else 0))
    def attention(c): return 2*c + conv(c, 3*c, 1) + conv(c, c, 1)
    total = (base + 1)*4*base + (4*base + 1)*4*base + classes*4*base + conv(3, base, 3)
    c, skips = base, [base]
    for level, m in enumerate(multipliers):
        for _ in range(blocks):
            total += block(c, m*base) + attend[level]*attention(m*base)
            c = m*base
            skips.append(c)
        if level < len(multipliers) - 1:
            total += block(c, c)
            skips.append(c)
    total += 2*block(c, c) + attention(c)
    for level, m in reversed(list(enumerate(multipliers))):
        for _ in range(blocks + 1):
            total += block(c + skips.pop(), m*base) + attend[level]*attention(m*base)
            c = m*base
        if level: total += block(c, c)
    return total + 2*c + conv(c, out, 3)


ADM = dict(base_channels=192, channel_multipliers=[1, 2, 3, 4], num_res_blocks=3, num_classes=1000,
           attention_resolutions=[32, 16, 8], attention_head_dim=64, adaptive_norm=True,
           resample="residual")


def test_published_size_of_adm():
    """295.90 M. Theirs has no row for "no label" (4·192 numbers), and learns a variance: three more
    outputs of the last convolution, 9·192 weights and a bias each."""
    published = adm_count(192, (1, 2, 3, 4), 3, (0, 1, 1, 1), 1000, 6)
    assert round(published/1e6, 2) == 295.90
    with torch.device("meta"): ours = create_unet(UNetConfig(**ADM), (3, 64, 64))
    assert count(ours) - 4*192 + 3*(9*192 + 1) == published
    assert not UNetConfig(**ADM).check((3, 64, 64))
    assert {a.heads for a in ours.downs[1].attentions} == {6} and ours.mid_attention.heads == 12


CONDITIONS = dict(label=LabelCondition(count=3), numbers=VectorCondition(size=2),
                  caption=TextCondition(words=9, length=4, heads=2),
                  words=TokenCondition(length=3, size=5), image=ImageCondition(channels=2))


def told(n, height=16, width=16):
    "Of each condition some, and for the last sample none."
    cond = dict(label=torch.arange(n) % 3, numbers=torch.randn(n, 2),
                caption=torch.randint(1, 9, (n, 4)), words=torch.randn(n, 3, 5),
                image=torch.randn(n, 2, height, width))
    cond["caption"][0, 2:] = 0
    for name, null in dict(label=-1, numbers=0, caption=0, words=0, image=0).items():
        cond[name][-1] = null
    cond["caption"][-1, 0] = 2
    return cond


def awake(network):
    "Small random weights in place of all zeros."
    for p in network.parameters():
        if not p.any(): nn.init.normal_(p, std=0.05)
    return network


FAMILY = {
    "ddpm": {}, "improved": dict(adaptive_norm=True, attention_heads=2),
    "adm": dict(adaptive_norm=True, attention_head_dim=4, resample="residual"),
    "residual": dict(resample="residual"), "pool": dict(resample="pool"),
    "levels": dict(attention_levels=(0, 1)), "patches": dict(patch_size=2),
    "deep": dict(channel_multipliers=(1, 2, 2), num_res_blocks=2),
    "told": dict(conditions=CONDITIONS), "told adm": dict(
        conditions=CONDITIONS, adaptive_norm=True, resample="residual", attention_heads=4),
    "dropout": dict(dropout=0.2), "checkpoints": dict(gradient_checkpointing=True),
    "told checkpoints": dict(conditions=CONDITIONS, gradient_checkpointing=True),
    **{name: dict(norm=name, adaptive_norm=True) for name in NORMS if name != "none"}}
TOY = dict(image_size=16, base_channels=8, channel_multipliers=(1, 2), norm_groups=4,
           num_res_blocks=1, attention_resolutions=(8,))


@pytest.mark.parametrize("name", FAMILY)
def test_starts_at_zero_and_learns_everywhere(name):
    """Zero before the first step. The last convolution moves first, then what ends in zeros, and
    after two steps every parameter has a gradient."""
    torch.manual_seed(0)
    network = UNet(**{**TOY, **FAMILY[name]})
    adam = torch.optim.Adam(network.parameters(), 0.01)
    x, t, seen = torch.randn(4, 3, 16, 16), torch.arange(4)*250, []
    cond = told(4) if network.null_cond is not None else None
    noise = torch.randn_like(x)
    for _ in range(3):
        out = network(x, t, cond)
        if not seen: assert not out.any() and out.shape == x.shape
        adam.zero_grad()
        (out - noise).square().mean().backward()
        seen.append({n for n, p in network.named_parameters()
                     if p.grad is not None and p.grad.any()})
        adam.step()
    assert seen[0] == {"conv_out.weight", "conv_out.bias"}
    assert seen[2] == {n for n, _ in network.named_parameters()}


@pytest.mark.parametrize("name", ["ddpm", "adm", "told", "dropout"])
@pytest.mark.parametrize("autocast, layout", [(False, torch.contiguous_format),
                                              (True, torch.contiguous_format),
                                              (False, torch.channels_last),
                                              (True, torch.channels_last)])
def test_gradient_checkpointing_changes_nothing_but_memory(name, autocast, layout):
    torch.manual_seed(0)
    plain = awake(UNet(**{**TOY, **FAMILY[name], "dropout": 0.3})).to(memory_format=layout)
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing = True
    x, t = torch.randn(3, 3, 16, 16).contiguous(memory_format=layout), torch.arange(3)
    cond, grads = told(3) if plain.null_cond is not None else None, []
    for network in (plain, saving):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast): out = network(x, t, cond)
        out.float().square().mean().backward()
        grads.append((out, *[p.grad for p in network.parameters()]))
    for a, b in zip(*grads): assert torch.equal(a, b)


@pytest.mark.parametrize("size", [(16, 16), (16, 40), (24, 8)])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_height_width_and_channels(size, channels):
    network = UNet(**{**TOY, "image_size": size}, channels=channels, conditions=CONDITIONS)
    x = torch.randn(2, channels, *size)
    assert awake(network)(x, torch.zeros(2), told(2, *size)).shape == x.shape


@pytest.mark.parametrize("size", [(13, 16), (16, 3), (1, 1), (30, 22)])
def test_padding(size):
    network = awake(UNet(**{**TOY, "image_size": size}, pad=True, patch_size=2,
                         conditions=CONDITIONS)).eval()
    x, t, cond = torch.randn(2, 3, *size), torch.zeros(2), told(2, *size)
    out = network(x, t, cond)
    assert out.shape == x.shape
    more = [-s % 4 for s in size]
    wide = lambda x: F.pad(x, (0, more[1], 0, more[0]))
    whole = network(wide(x), t, {**cond, "image": wide(cond["image"])})
    assert torch.equal(out, whole[..., :size[0], :size[1]])


def test_attention_is_torch_own():
    "Self-attention and cross-attention with a mask, against nn.MultiheadAttention."
    torch.manual_seed(0)
    for known in (None, 6):
        ours = Attention(16, heads=4, groups=4, token_channels=known)
        nn.init.normal_(ours.to_out.weight)
        other = nn.MultiheadAttention(16, 4, batch_first=True, kdim=known, vdim=known)
        weights = [part.weight for part in (ours.to_q, ours.to_k, ours.to_v)]
        with torch.no_grad():
            if known is None: other.in_proj_weight.copy_(torch.cat(weights))
            else:
                for name, w in zip("qkv", weights): getattr(other, f"{name}_proj_weight").copy_(w)
            other.in_proj_bias.copy_(torch.cat([p.bias for p in (ours.to_q, ours.to_k, ours.to_v)]))
            other.out_proj.load_state_dict(ours.to_out.state_dict())
        x = torch.randn(3, 16, 4, 6)
        places = ours.norm(x).flatten(2).mT
        tokens, mask = (None, None) if known is None else (
            torch.randn(3, 7, 6), torch.arange(7) < torch.tensor([[7], [1], [4]]))
        keys = places if known is None else tokens
        out, _ = other(places, keys, keys, key_padding_mask=None if mask is None else ~mask)
        torch.testing.assert_close(ours(x, tokens, mask), x + out.mT.reshape(x.shape), atol=1e-5,
                                   rtol=1e-5)


def test_names_are_the_registries():
    "The config's names are the tables' keys; it cannot look, for it loads no torch."
    fields = UNetConfig.model_fields
    assert set(get_args(fields["resample"].annotation)) == set(RESAMPLERS)
    assert {*get_args(fields["norm"].annotation)} <= {*NORMS}


def test_fields_are_arguments_and_mean_the_same():
    "Every field of the config reaches the network: one that is moved from its default is seen."
    moved = dict(base_channels=16, channel_multipliers=[1, 3], num_res_blocks=3,
                 attention_resolutions=[8], attention_levels=[0, 2], attention_heads=2,
                 attention_head_dim=8, dropout=0.4, norm="layer", norm_groups=4, adaptive_norm=True,
                 resample="pool", num_classes=4, conditions={"numbers": VectorCondition(size=2)},
                 patch_size=2, pad=True, gradient_checkpointing=True)
    assert set(moved) == set(UNetConfig.model_fields) - {"name"}
    base = dict(base_channels=8, channel_multipliers=[1, 2, 2], norm_groups=2, num_res_blocks=1)
    def picture(**options):
        network = create_unet(UNetConfig(**{**base, **options}), (3, 32, 32))
        return (repr(network), [a.heads for a in network.modules() if isinstance(a, Attention)],
                network.pad, network.gradient_checkpointing,
                [getattr(m, "groups", 0) for m in network.modules()])
    plain = picture()
    for name, value in moved.items():
        assert picture(**{name: value}) != plain, name


def test_weights_of_older_versions_open():
    "The table of labels was called label_emb."
    network = UNet(**TOY, num_classes=3)
    state = {name.replace("conditions.embedders.label.table", "label_emb"): torch.randn_like(p)
             for name, p in network.state_dict().items()}
    assert "label_emb.weight" in state
    for part in (network, copy.deepcopy(network)):
        part.load_state_dict(state)
        assert part.conditions.embedders["label"].table.weight.equal(state["label_emb.weight"])
    nn.ModuleDict({"inner": network}).load_state_dict(
        {f"inner.{name}": value for name, value in state.items()})


def test_silu_of_the_embedding_is_computed_once(monkeypatch):
    calls, silu = [], F.silu
    monkeypatch.setattr(F, "silu", lambda x, *a, **k: calls.append(x.shape) or silu(x, *a, **k))
    UNet(**TOY)(torch.randn(2, 3, 16, 16), torch.zeros(2))
    assert sum(len(shape) == 2 for shape in calls) == 2  # and one inside the time's own layers


def test_every_parameter_learns():
    network = UNet(**SMALL, num_classes=2)
    with torch.no_grad():
        for p in network.parameters(): p.add_(0.01*torch.randn_like(p))
    network(torch.randn(4, 3, 32, 32), torch.arange(4),
            torch.tensor([0, 1, -1, 0])).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_other_sizes_that_divide():
    assert UNet(**SMALL)(torch.randn(1, 3, 48, 16), torch.zeros(1)).shape == (1, 3, 48, 16)


def test_bf16_autocast():
    network = UNet(**SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(torch.randn(2, 3, 32, 32), torch.zeros(2))
    assert out.isfinite().all()


def test_channels_last_gives_the_same():
    network = UNet(**SMALL).eval()
    torch.nn.init.normal_(network.conv_out.weight)
    x, t = torch.randn(2, 3, 32, 32), torch.zeros(2)
    same = network(x, t)
    last = torch.channels_last
    lasting = network.to(memory_format=last)(x.contiguous(memory_format=last), t)
    assert (same - lasting).abs().max() < 1e-5*same.abs().max()


@pytest.mark.parametrize("name", ["ddpm", "adm", "told", "pool", "deep"])
def test_channels_last_stays_so(name):
    "From the first convolution to the last no map changes its layout, so none is copied for it."
    last = torch.channels_last
    network = awake(UNet(**{**TOY, **FAMILY[name]})).to(memory_format=last).eval()
    found = {}
    for part_name, part in network.named_modules():
        def note(part, args, out, name=part_name):
            if isinstance(out, torch.Tensor) and out.ndim == 4:
                found[name] = out.is_contiguous(memory_format=last)
        part.register_forward_hook(note)
    cond = told(2) if network.null_cond is not None else None
    out = network(torch.randn(2, 3, 16, 16).contiguous(memory_format=last), torch.zeros(2), cond)
    assert found and all(found.values()), [n for n, lasts in found.items() if not lasts]
    assert out.is_contiguous(memory_format=last)


@pytest.mark.parametrize("make, x, y, says", [
    ({"image_size": 30, "channel_multipliers": (1, 2, 2)}, None, None, "28 or 32"),
    ({"image_size": 2, "channel_multipliers": (1, 2, 2)}, None, None, "multiples of 4"),
    ({"image_size": (32, 30), "channel_multipliers": (1, 2, 2)}, None, None, "width 30: 28 or 32"),
    ({}, (1, 3, 33, 32), None, "multiples of 2"), ({}, (1, 1, 32, 32), None, "takes"),
    ({}, (3, 32, 32), None, "takes"),
    ({}, (1, 3, 32, 32), 0, "unconditional"), ({"num_classes": 2}, (1, 3, 32, 32), None,
                                               "pass cond")])
def test_refusals(make, x, y, says):
    with pytest.raises(ValueError, match=says):
        network = UNet(**{**SMALL, **make})
        network(torch.zeros(x), torch.zeros(1), y if y is None else torch.tensor([y]))
