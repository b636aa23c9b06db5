"Autoencoders in the commands: judged by reconstructions, never drawn from; and their latents."
import json

import pytest
import torch

from diffusion_model import cli
from diffusion_model.autoencoder import create_autoencoder
from diffusion_model.autoencoder_config import AutoencoderConfig
from diffusion_model.checkpoint import CheckpointError, load_checkpoint
from diffusion_model.config import load_config
from diffusion_model.dataset import create_dataset
from diffusion_model.generation import load_denoiser, load_network
from diffusion_model.interop import set_scale, write_autoencoder_kl
from diffusion_model.judge import Reconstructed, create_judge, dataset_images, quality_line
from diffusion_model.latents import saved_autoencoder
from diffusion_model.processes import World
from diffusion_model.pixels import psnr

SIZES = ["--image_size", "16", "--train_size", "400", "--test_size", "300", "--batch_size", "8",
         "--base_channels", "8", "--norm_groups", "4", "--num_res_blocks", "1", "--log_every", "1",
         "--device", "cpu", "--max_steps", "2"]
AUTOENCODER = ["--config", "autoencoder", *SIZES, "--channel_multipliers", "[1,2]",
               "--patch_size", "1"]
LATENT = ["--config", "latent", *SIZES, "--channel_multipliers", "[1]", "--steps", "2",
          "--attention_resolutions", "[]"]
EVALUATED = ["--callbacks", "[evaluate]", "--evaluate_every", "2", "--evaluate_images", "120"]
EYE = ["--features", "shapes-a", "--metrics"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A run of an autoencoder, diffusers' folder of another, and a run in its latents; 2 steps each."
    top = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFUSION_MODEL_CACHE", str(top/"cache"))
        words = [*AUTOENCODER, *EVALUATED, "--output_dir", str(top/"autoencoder")]
        assert cli.train_command(words) == 0
        write_autoencoder_kl(untrained(), top/"pipeline"/"vae", 16)
        words = [*LATENT, *EVALUATED, "--data.autoencoder", str(top/"pipeline"), "--output_dir",
                 str(top/"latent")]
        assert cli.train_command(words) == 0
    return top


def untrained():
    "An autoencoder with random weights, whose scale is that of its latents."
    model = AutoencoderConfig(base_channels=8, channel_multipliers=[1, 2], num_res_blocks=1,
                              norm_groups=4, latent_convs=True)
    torch.manual_seed(0)
    ours = create_autoencoder(model, (3, 16, 16)).eval().requires_grad_(False)
    cfg = load_config("quickstart", ["--image_size=16", "--train_size=400"])
    z = ours.encode(create_dataset(cfg.data).train.batch(torch.arange(400)).images).mean
    set_scale(ours, 1/z.std().item(), z.mean().item())
    return ours


@pytest.fixture
def call(command, monkeypatch, runs):
    monkeypatch.setenv("DIFFUSION_MODEL_CACHE", str(runs/"cache"))
    return lambda work, *words: command(getattr(cli, f"{work}_command"), [*map(str, words)])


def metrics(run):
    rows = map(json.loads, (run/"metrics.jsonl").read_text().splitlines())
    return {name: value for row in rows for name, value in row.items()}


@pytest.mark.parametrize("name", ["autoencoder", "latent"])
def test_evaluate_in_a_run(runs, name):
    "The callback judges images: reconstructions, or decoded samples."
    found = metrics(runs/name)
    assert {"fd/shapes-a", "kid/shapes-b", "recall/shapes-a"} <= set(found)
    assert found["fd/shapes-a"] > 0


def test_only_reconstructions_are_judged_in_a_run(runs):
    "Originals would lie at the floor; two steps of training cannot."
    cfg = load_checkpoint(runs/"autoencoder").config
    datasets = create_dataset(cfg.data)
    judge = create_judge(cfg.data, datasets, features=["shapes-a"], metrics=["fd"])
    network = saved_autoencoder(load_checkpoint(runs/"autoencoder"))
    held = dataset_images(datasets.validation, cfg.data, "validation")._replace(count=120)
    line, = judge.judge(Reconstructed(network, held, cfg.data).images)
    assert line.value == pytest.approx(metrics(runs/"autoencoder")["fd/shapes-a"], rel=1e-3)


def test_judged_by_its_reconstructions(runs, call, tmp_path):
    run = runs/"autoencoder"
    done = call("evaluate", "--checkpoint", run, *EYE, "fd,accuracy,memorised", "--output_dir",
                tmp_path)
    assert done.code == 0, done.err
    found = json.loads((tmp_path/"report.json").read_text())
    rows = {row["metric"]: row for row in found["results"]}
    assert list(rows) == ["fd", "accuracy", "memorised", "psnr"]
    assert found["samples"]["count"] == 300 and found["sampling"] is None
    assert rows["psnr"]["name"].startswith("PSNR[model, n=300, test, ± ")
    assert rows["fd"]["floor"]["folds"] == 1 and rows["psnr"]["floor"] is None
    network, cfg = load_network(run)
    test = create_dataset(cfg.data).test.batch(torch.arange(300)).images
    byte = lambda x: ((x + 1)*127.5).round().clamp(0, 255).to(torch.uint8)
    with torch.no_grad(): expected = psnr(byte(network(test)), byte(test)).mean().item()
    assert rows["psnr"]["value"] == pytest.approx(expected, abs=1e-3)
    assert metrics(run)["psnr/model"] == rows["psnr"]["value"]
    assert "psnr" in done.out
    page = (tmp_path/"report.html").read_text()
    assert "a row of originals" in page and "to their originals, in dB" in page


def test_fewer_images_and_other_references(runs, call, tmp_path):
    run = runs/"autoencoder"
    words = ["evaluate", "--checkpoint", run, *EYE, "psnr,fd", "--output_dir", tmp_path]
    assert call(*words, "--num_samples", 150, "--reference", "validation").code == 0
    found = json.loads((tmp_path/"report.json").read_text())
    assert found["samples"]["count"] == 150 and found["reference"]["name"] == "validation"
    assert found["results"][-1]["name"].startswith("PSNR[model, n=150, validation")


@pytest.mark.parametrize("words, message", [
    (["--metrics", "bits_per_dim"], "bits_per_dim is of a model that draws images, and this one"),
    (["--steps", "4"], "--steps: says how to draw, and an autoencoder only reconstructs"),
    (["--num_samples", "301"], "--num_samples: found 301; there are 300 images in test"),
    (["--num_samples", "10"], "samples: found 10")])
def test_what_an_autoencoder_cannot_be_asked(runs, call, words, message):
    done = call("evaluate", "--checkpoint", runs/"autoencoder", *EYE[:2], *words)
    assert done.code == 2 and message in done.err


def test_nothing_is_drawn_with_an_autoencoder(runs, call):
    done = call("sample", "--checkpoint", runs/"autoencoder")
    assert done.code == 2
    for part in ("reconstructs images and draws none", "--config latent --data.autoencoder",
                 "diffusion-evaluate"): assert part in done.err
    with pytest.raises(CheckpointError, match="draws none"): load_denoiser(runs/"autoencoder")


def test_what_is_said_at_the_end_of_a_run(call, tmp_path, runs):
    done = call("train", *AUTOENCODER, "--output_dir", tmp_path/"run", "--max_steps", 1)
    assert done.code == 0 and "diffusion-sample" not in done.out
    assert f"diffusion-evaluate --checkpoint {tmp_path}/run" in done.out
    assert f"diffusion-train --config latent --data.autoencoder {tmp_path}/run" in done.out


@pytest.mark.parametrize("name", ["autoencoder", "latent"])
def test_a_dry_run(call, tmp_path, runs, name):
    words = AUTOENCODER if name == "autoencoder" else \
        [*LATENT, "--data.autoencoder", runs/"pipeline"]
    done = call("train", *words, "--output_dir", tmp_path/"run", "--dry_run")
    assert done.code == 0, done.err
    assert "parameters" in done.out and "nothing was written" in done.out
    assert not (tmp_path/"run").exists()


def test_a_model_in_diffusers_latents_is_whole(runs, call, tmp_path):
    "Its checkpoint carries the decoder: it draws and is judged where diffusers' folder is gone."
    (runs/"pipeline").rename(runs/"moved")
    try:
        done = call("sample", "--checkpoint", runs/"latent", "--num_samples", 2, "--output_dir",
                    tmp_path/"drawn")
        assert done.code == 0 and len(list((tmp_path/"drawn").glob("0*.png"))) == 2, done.err
        done = call("evaluate", "--checkpoint", runs/"latent", "--num_samples", 120, *EYE, "fd",
                    "--output_dir", tmp_path/"report")
        assert done.code == 0 and " fd " in done.out, done.err
        done = call("evaluate", "--checkpoint", runs/"latent", "--num_samples", 120, *EYE,
                    "fd,bits_per_dim")
        assert done.code == 2 and "this model works in a space without them" in done.err
        done = call("evaluate", "--checkpoint", runs/"latent", *EYE, "psnr")
        assert done.code == 2 and "psnr is of a model that reconstructs images" in done.err
    finally: (runs/"moved").rename(runs/"pipeline")
    kept, given = saved_autoencoder(load_checkpoint(runs/"latent")), untrained()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(kept.scaled(kept.encode(x).mean), given.scaled(given.encode(x).mean))


def test_several_processes_share_the_pairs(runs):
    "Each has seen its share; the line is of all."
    cfg = load_checkpoint(runs/"autoencoder").config
    test = dataset_images(create_dataset(cfg.data).test, cfg.data, "test")
    network = saved_autoencoder(load_checkpoint(runs/"autoencoder"))
    whole, first, rest = (Reconstructed(network, test, cfg.data) for _ in range(3))
    for made, parts in ((whole, (0, 300)), (first, (0, 130)), (rest, (130, 300))):
        for _ in made.read(*parts): pass
    other = [rest.quality[130:].double().sum(), rest.quality[130:].double().square().sum(), 170]

    class Two(World):
        def __init__(self): pass
        def sum(self, *values): return [float(a + b) for a, b in zip(values, other)]
    joined = quality_line(first, Two())
    assert joined.value == pytest.approx(quality_line(whole).value)
    assert joined.name == quality_line(whole).name
