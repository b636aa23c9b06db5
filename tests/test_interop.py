"Our autoencoder and diffusers' AutoencoderKL: the same numbers, both ways, and what is refused."
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_model.autoencoder import create_autoencoder
from diffusion_model.autoencoder_config import AutoencoderConfig
from diffusion_model.interop import (
    CONFIG, ENTRIES, OLDER, WEIGHTS, find_autoencoder_kl, read_autoencoder_kl,
    write_autoencoder_kl)

SD = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4)
TINY = dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)
PUBLISHED = {
    "sd-1": (SD, dict(scaling_factor=0.18215)),
    "sd-3": (SD | dict(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
             dict(scaling_factor=1.5305, shift_factor=0.0609)),
    "sdxl, narrow": (SD | dict(block_out_channels=(32, 64, 128, 128)),
                     dict(scaling_factor=0.13025)),
    "flux, narrow": (SD | dict(block_out_channels=(32, 64, 128, 128), latent_channels=16,
                               use_quant_conv=False, use_post_quant_conv=False),
                     dict(scaling_factor=0.3611, shift_factor=0.1159)),
    "tiny": (TINY, {}),
    "uneven": (TINY | dict(block_out_channels=(24, 40, 64)), dict(scaling_factor=2.)),
    "one level": (TINY | dict(block_out_channels=(16,)), {}),
    "no attention": (TINY | dict(mid_block_add_attention=False), {}),
    "grey": (TINY | dict(in_channels=1, out_channels=1), {}),
}


def kl(sizes, scale):
    "diffusers' autoencoder, with random weights, none of them 0."
    diffusers = pytest.importorskip("diffusers")
    n = len(sizes["block_out_channels"])
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        **sizes, **scale, down_block_types=("DownEncoderBlock2D",)*n,
        up_block_types=("UpDecoderBlock2D",)*n)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1: p += 0.1*torch.randn_like(p)
    return model.eval().requires_grad_(False)


def assert_equal(ours, theirs, side=32):
    "Means, log-variances, images, and the scale of latents."
    torch.manual_seed(1)
    x = 2*torch.rand(2, ours.channels, side, side) - 1
    found, expected = ours.encode(x), theirs.encode(x).latent_dist
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.logvar, expected.logvar, rtol=1e-5, atol=1e-5)
    z = torch.randn_like(found.mean)
    torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, rtol=1e-5, atol=1e-5)
    shift = theirs.config.shift_factor or 0.
    scaled = (z - shift)*theirs.config.scaling_factor
    torch.testing.assert_close(ours.scaled(z), scaled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.unscaled(scaled), z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_diffusers_folder_opens(tmp_path, name):
    theirs = kl(*PUBLISHED[name])
    theirs.save_pretrained(tmp_path)
    ours = read_autoencoder_kl(tmp_path)
    assert_equal(ours, theirs)
    assert not ours.training and ours.latents_seen > 0


@pytest.mark.parametrize("change", [
    {}, {"latent_convs": True}, {"attention": False}, {"channel_multipliers": [1, 1, 3]},
    {"num_res_blocks": 2, "latent_channels": 3}])
def test_diffusers_opens_ours(tmp_path, change):
    diffusers = pytest.importorskip("diffusers")
    fields = dict(base_channels=16, channel_multipliers=[1, 2], num_res_blocks=1, norm_groups=8)
    torch.manual_seed(0)
    ours = create_autoencoder(AutoencoderConfig(**fields | change), (3, 32, 32)).eval()
    with torch.no_grad():
        for p in ours.parameters(): p += 0.05*torch.randn_like(p)
    ours.latent_mean.fill_(-0.3)
    ours.latent_var.fill_(2.5)
    write_autoencoder_kl(ours.requires_grad_(False), tmp_path/"vae", 32)
    theirs, info = diffusers.AutoencoderKL.from_pretrained(tmp_path/"vae", output_loading_info=True)
    assert not any(info.values()), info
    assert theirs.config.sample_size == 32 and theirs.config.shift_factor == pytest.approx(-0.3)
    assert_equal(ours, theirs.eval())
    back = read_autoencoder_kl(tmp_path)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(back(x), ours(x))


def test_the_fields_are_those_of_diffusers():
    "Names and defaults, as its class has them: a new field would show here."
    import inspect
    diffusers = pytest.importorskip("diffusers")
    theirs = inspect.signature(diffusers.AutoencoderKL.__init__).parameters
    known = {name: p.default for name, p in theirs.items() if name != "self"}
    plain = lambda v: [*v] if isinstance(v, tuple) else v
    assert {n: e.default for n, e in ENTRIES.items() if n != "_class_name"} == {
        n: plain(v) for n, v in known.items()}


def test_older_names_open_as_diffusers_opens_them(tmp_path):
    "Stable Diffusion 1's file names attention's parts as early versions did, and says less."
    diffusers = pytest.importorskip("diffusers")
    theirs = kl(TINY, {})
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path/WEIGHTS)
    for old, new in OLDER: state = {k.replace(new, old): v for k, v in state.items()}
    assert any(".query." in name for name in state)
    save_file(state, tmp_path/WEIGHTS, {"format": "pt"})
    fields = json.loads((tmp_path/CONFIG).read_text())
    for name in ("scaling_factor", "shift_factor", "force_upcast", "use_quant_conv",
                 "use_post_quant_conv", "mid_block_add_attention", "latents_mean", "latents_std"):
        del fields[name]
    (tmp_path/CONFIG).write_text(json.dumps(fields))
    assert_equal(read_autoencoder_kl(tmp_path), diffusers.AutoencoderKL.from_pretrained(tmp_path))


def test_half_precision_opens(tmp_path):
    theirs = kl(TINY, {}).half()
    theirs.save_pretrained(tmp_path)
    ours = read_autoencoder_kl(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_equal(ours, theirs.float())


@pytest.fixture
def written(tmp_path):
    "A folder of ours, diffusers or not."
    model = AutoencoderConfig(base_channels=8, channel_multipliers=[1, 2], num_res_blocks=1,
                              norm_groups=4, latent_convs=True)
    torch.manual_seed(0)
    ours = create_autoencoder(model, (3, 16, 16)).eval()
    with torch.no_grad():
        for p in ours.parameters(): p += 0.1*torch.randn_like(p)
    return write_autoencoder_kl(ours, tmp_path/"kl", 16)


def test_where_the_config_lies(written, tmp_path):
    assert find_autoencoder_kl(written) == written
    shutil.copytree(written, tmp_path/"pipeline"/"vae")
    assert find_autoencoder_kl(tmp_path/"pipeline") == tmp_path/"pipeline"/"vae"
    assert find_autoencoder_kl(tmp_path) is None and find_autoencoder_kl("nowhere") is None


@pytest.mark.parametrize("change, message", [
    ({"_class_name": "AutoencoderTiny"}, '_class_name: found "AutoencoderTiny"; allowed: "Auto'),
    ({"act_fn": "gelu"}, 'act_fn: found "gelu"; allowed: "silu" or "swish"'),
    ({"scaling_factor": 0}, "scaling_factor: found 0; allowed: a number above 0"),
    ({"scaling_factor": True}, "scaling_factor: found true"),
    ({"shift_factor": "0"}, 'shift_factor: found "0"; allowed: a number, or null'),
    ({"latents_mean": [0.1]*4}, "latents_mean: found [0.1, 0.1, 0.1, 0.1]; allowed: null"),
    ({"latents_std": [1.]*4}, "latents_std: found"),
    ({"block_out_channels": []}, "block_out_channels: found []; allowed: a list of whole"),
    ({"block_out_channels": [8.5, 16]}, "block_out_channels: found [8.5, 16]"),
    ({"layers_per_block": 0}, "layers_per_block: found 0; allowed: a whole number"),
    ({"norm_num_groups": 3}, "norm_num_groups: found 3, which does not divide 8 channels"),
    ({"out_channels": 6}, "out_channels: found 6 with in_channels 3; allowed: the same for both"),
    ({"use_post_quant_conv": False}, "use_post_quant_conv: found false with use_quant_conv true"),
    ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types: found 1 of them, and block_out"),
    ({"down_block_types": ["AttnDownEncoderBlock2D"]*2}, "down_block_types: found"),
    ({"attention_head_dim": 8}, "attention_head_dim: found 8, a field that is not known here"),
    ({"mid_block_add_attention": "yes"}, 'mid_block_add_attention: found "yes"'),
    ({"mid_block_add_attention": False}, "weights that the network does not have: decoder.mid_b"),
    ({"layers_per_block": 2}, "weights are missing: encoder.down_blocks.0.resnets.1."),
    ({"latent_channels": 8}, "found shape (16, 4, 3, 3); config.json says (16, 8, 3, 3)"),
])
def test_what_cannot_be_carried_over(written, change, message):
    file = written/CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError) as error: read_autoencoder_kl(written)
    assert message in str(error.value), error.value
    if not str(error.value).count("\n"): assert str(error.value).startswith(str(written))


def test_files_that_are_no_autoencoder(written, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json, nor has its vae/"):
        read_autoencoder_kl(tmp_path/"nowhere")
    (written/WEIGHTS).write_bytes((written/WEIGHTS).read_bytes()[:-100])
    with pytest.raises(ValueError, match="it cannot be read as safetensors"):
        read_autoencoder_kl(written)
    (written/WEIGHTS).rename(written/"diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"found diffusion_pytorch_model.bin; needed is "):
        read_autoencoder_kl(written)
    (written/"diffusion_pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="found no weights"): read_autoencoder_kl(written)
    for text, message in (("[1]", "no JSON object"), ("{", "no JSON \\(")):
        (written/CONFIG).write_text(text)
        with pytest.raises(ValueError, match=message): read_autoencoder_kl(written)


def test_weights_that_are_not_finite(written):
    state = load_file(written/WEIGHTS)
    state["quant_conv.bias"][1] = float("inf")
    save_file(state, written/WEIGHTS)
    with pytest.raises(ValueError, match="quant_conv.bias: found numbers that are not finite"):
        read_autoencoder_kl(written)


@pytest.mark.parametrize("change, message", [
    ({"norm": "layer"}, "model.norm: found 'layer', and diffusers' AutoencoderKL has no such"),
    ({"patch_size": 2}, "model.patch_size: found 2")])
def test_autoencoders_that_diffusers_cannot_be(tmp_path, change, message):
    model = AutoencoderConfig(base_channels=8, channel_multipliers=[1, 2], norm_groups=4, **change)
    with pytest.raises(ValueError) as error:
        write_autoencoder_kl(create_autoencoder(model, (3, 16, 16)), tmp_path/"kl", 16)
    assert message in str(error.value) and not (tmp_path/"kl").exists()


def test_a_folder_with_other_files_is_left_alone(written, tmp_path):
    ours = read_autoencoder_kl(written)
    (tmp_path/"run").mkdir()
    (tmp_path/"run"/"config.yaml").write_text("a: 1")
    with pytest.raises(ValueError, match="holds config.yaml; choose a new or empty folder"):
        write_autoencoder_kl(ours, tmp_path/"run", 16)
    assert write_autoencoder_kl(ours, written, (16, 24)) == written  # its own is replaced
    assert json.loads((written/CONFIG).read_text())["sample_size"] == [16, 24]
    assert sorted(p.name for p in written.iterdir()) == [CONFIG, WEIGHTS]
