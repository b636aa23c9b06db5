"The U-Net against diffusers' implementation of DDPM's network, and what it refuses."
import re

import pytest
import torch

from diffusion_model.config import load_config
from diffusion_model.unet import UNet, create_unet

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


def test_weights_of_ddpm_by_renaming():
    "Random weights of diffusers' network, renamed: the same outputs, at several times."
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    reference = diffusers.UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=2, act_fn="silu",
        block_out_channels=(128, 256, 256, 256), downsample_padding=0, flip_sin_to_cos=False,
        freq_shift=1, norm_eps=1e-6, norm_num_groups=32, attention_head_dim=None,
        mid_block_scale_factor=1, time_embedding_type="positional", center_input_sample=False,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")).eval()
    network = create_unet(load_config("default").model, (3, 32, 32)).eval()
    state = reference.state_dict()
    assert sum(v.numel() for v in state.values()) == 35_746_307
    renamed = {name: state.pop(theirs(name)) for name in network.state_dict()}
    assert not state, f"left over: {list(state)[:5]}"
    network.load_state_dict(renamed, strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for t in (0, 1, 500, 999):
            assert torch.allclose(network(x, torch.tensor(t)), reference(x, t).sample, atol=1e-5,
                                  rtol=1e-5)


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
    assert torch.allclose(same, lasting, atol=1e-5)


@pytest.mark.parametrize("make, x, y, says", [
    ({"image_size": 30, "channel_multipliers": (1, 2, 2)}, None, None, "28 or 32"),
    ({"image_size": 2, "channel_multipliers": (1, 2, 2)}, None, None, "multiples of 4"),
    ({}, (1, 3, 33, 32), None, "multiples of 2"), ({}, (1, 1, 32, 32), None, "takes"),
    ({}, (3, 32, 32), None, "takes"),
    ({}, (1, 3, 32, 32), 0, "unconditional"), ({"num_classes": 2}, (1, 3, 32, 32), None,
                                               "pass cond")])
def test_refusals(make, x, y, says):
    with pytest.raises(ValueError, match=says):
        network = UNet(**{**SMALL, **make})
        network(torch.zeros(x), torch.zeros(1), y if y is None else torch.tensor([y]))
