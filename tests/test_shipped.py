"Models that come with the package: found by name, small, told of, and the same images everywhere."
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import ship
from diffusion_model import report, speed
from diffusion_model.checkpoint import (CheckpointError, find_checkpoint, load_checkpoint,
                                        verify_checkpoint)
from diffusion_model.cli import evaluate_command, sample_command, train_command
from diffusion_model.config import ConfigError, find_model, list_models, load_config, say_models
from diffusion_model.generation import load_denoiser, load_network
from diffusion_model.judge import Line
from diffusion_model.plotting import image_grid
from diffusion_model.training import Trainer

MODELS = list_models()
each = pytest.mark.parametrize("name", MODELS)


# Names
def test_there_are_models():
    assert "shapes" in MODELS
    assert set(MODELS) == {p.name for p in ship.MODELS.iterdir()}, "a folder that is no model"


@pytest.mark.parametrize("open_it", [load_checkpoint, find_checkpoint, load_network, load_denoiser])
def test_a_name_is_found_and_a_path_wins(open_it, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_it("shapes")
    (tmp_path/"shapes").mkdir()
    hidden = re.escape(f"The shipped model shapes is at {MODELS['shapes']}: what is called so")
    with pytest.raises(FileNotFoundError, match=hidden): open_it("shapes")
    assert open_it(MODELS["shapes"])


@pytest.mark.parametrize("open_it", [load_checkpoint, load_network, load_denoiser])
def test_an_unknown_name_is_told_what_there_is(open_it, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, words in (("shaeps", r"Did you mean shapes\? "), ("qqq", "")):
        said = rf"no checkpoint at {name}: .*\. {words}Shipped models: .*shapes"
        with pytest.raises(FileNotFoundError, match=said): open_it(name)
    with pytest.raises(FileNotFoundError, match="there is no such folder"): open_it("./shapes")


def test_a_run_of_that_name_is_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODELS["shapes"], "elsewhere")
    shutil.copytree("elsewhere", "shapes")
    assert find_model("shapes").resolve() == tmp_path/"shapes"
    assert load_checkpoint("shapes").path.resolve() == tmp_path/"shapes"
    assert "hides it" in say_models("shapes")


@pytest.mark.parametrize("command", [sample_command, evaluate_command])
def test_commands_know_the_names(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command(["--checkpoint", "shaeps"]) == 2
    said = capsys.readouterr().err
    assert "no such checkpoint or run: 'shaeps'" in said and "Did you mean shapes?" in said
    assert command(["--checkpoint", "./shapes"]) == 2
    assert "Shipped models: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_names_them(capsys):
    with pytest.raises(SystemExit): sample_command(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"a model that comes with the package: {', '.join(MODELS)}" in said


def test_sampling_leaves_the_package_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["--checkpoint", "shapes", "--num_samples", "2", "--steps", "1", "--labels", "star,heart"]
    before = sorted(MODELS["shapes"].rglob("*"))
    assert sample_command(few) == 0 and sample_command([*few, "--seed", "1"]) == 0
    there = tmp_path/"outputs"/"shipped"/"shapes"/"samples"
    assert sorted(p.name for p in there.iterdir()) == [
        "shapes_ddim_1_seed_0", "shapes_ddim_1_seed_1"]
    assert sorted(p.name for p in (there/"shapes_ddim_1_seed_0").iterdir()) == [
        "00000_star.png", "00001_heart.png", "grid.png"]
    assert sorted(MODELS["shapes"].rglob("*")) == before
    capsys.readouterr()
    assert sample_command([*few, "--best"]) == 2
    assert "the best is one of a run's: leave best=True out" in capsys.readouterr().err


def test_judging_leaves_the_package_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    def judge(judge, samples, folder, *_):
        folder.mkdir(parents=True)
        return [Line("accuracy", "shapes-a@12345678", "accuracy", 0.5, None, "higher")]
    monkeypatch.setattr(report, "evaluate_samples", judge)
    before = sorted(MODELS["shapes"].rglob("*"))
    assert evaluate_command(["--checkpoint", "shapes", "--num_samples", "120", "--data.test_size",
                             "200", "--features", "shapes-a", "--metrics", "accuracy"]) == 0
    there = tmp_path/"outputs"/"shipped"/"shapes"
    assert [p.name for p in (there/"evaluation").iterdir()] == ["shapes_seed_0"]
    row = json.loads((there/"metrics.jsonl").read_text())
    assert (row["step"], row["accuracy/shapes-a"]) == (load_checkpoint("shapes").step, 0.5)
    assert sorted(MODELS["shapes"].rglob("*")) == before


def test_none_is_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for given in ("shapes", str(MODELS["shapes"])):
        assert train_command(["--resume", given]) == 2
        said = capsys.readouterr().err
        assert f"'{given}' is a shipped model: its weights alone, and no optimizer" in said
        assert "diffusion-sample --checkpoint shapes" in said and "README.md says how" in said
    trainer = Trainer(load_config("quickstart", {"output_dir": "run", "train_size": 40,
                                                 "validation_size": 8, "test_size": 8}))
    with pytest.raises(CheckpointError, match="holds weights alone, and no trainer.pt"):
        trainer.resume("shapes")
    assert train_command(["--resume", "shaeps"]) == 2
    assert "no such checkpoint or run: 'shaeps'" in capsys.readouterr().err


# Each of them
@each
def test_it_is_small_and_whole(name):
    folder = MODELS[name]
    manifest = verify_checkpoint(folder)
    assert {p.name for p in folder.iterdir()} == {*manifest["files"], "manifest.json", "README.md",
                                                  "samples.png"}
    assert "trainer.pt" not in manifest["files"] and "ema.safetensors" not in manifest["files"]
    assert all("sha256" in entry for entry in manifest["files"].values())
    size = sum(p.stat().st_size for p in folder.iterdir())
    assert size <= (8_000_000 if name == "avatars" else 4_000_000)


@each
def test_damage_is_found(name, tmp_path):
    folder = shutil.copytree(MODELS[name], tmp_path/name)
    data = bytearray((folder/"model.safetensors").read_bytes())
    data[-1] ^= 64
    (folder/"model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="content is damaged"): load_denoiser(folder)


@each
def test_it_names_no_machine(name):
    for file in ("config.yaml", "manifest.json", "README.md"):
        text = (MODELS[name]/file).read_text("utf-8")
        found = re.search(r"(?:^|[\s'\"=:(`])((?:~|/\w+)/[^\s'\"`]*)", text)
        assert not found, f"{file}: {found[1]}"
    cfg = load_checkpoint(name).config
    assert cfg.data.root == "data" and cfg.logging.output_dir == f"outputs/shipped/{name}"
    assert cfg.sampling.sample_precision == "fp32" and cfg.training.device == "auto"


@each
def test_its_weights_are_in_16_bits_and_computed_with_in_32(name):
    weights = load_checkpoint(name).model
    assert {w.dtype for w in weights.values() if w.is_floating_point()} <= {torch.float16,
                                                                           torch.bfloat16}
    network, _ = load_network(name)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    for key, value in network.state_dict().items():
        assert torch.equal(value, weights[key].to(value.dtype)), key


@each
def test_its_card_is_complete(name):
    card, checkpoint = ship.read_card(MODELS[name]), load_checkpoint(name)
    assert list(card) == list(ship.FACTS)
    empty = [key for key, value in card.items() if value in (None, "", {}) and key != "prompts"]
    assert not empty, f"the card says nothing of {empty}"
    network, cfg = load_network(name)
    weights = checkpoint.files["model.safetensors"]["bytes"]
    assert (card["name"], card["steps"]) == (name, checkpoint.step)
    assert (card["seed"], card["data"]) == (cfg.training.seed, cfg.data.dataset)
    assert card["parameters"] == sum(p.numel() for p in network.parameters())
    assert card["bytes"] >= weights >= 2*card["parameters"]
    assert card["command"].startswith("diffusion-train ") and card["minutes"] > 0
    assert any(key.startswith("fd/") and figure["floor"] for key, figure in card["figures"].items())
    assert card["rounding"]["kind"] in ship.KINDS
    assert card["rounding"]["grey_levels"] >= (card["rounding"]["share"] > 0)


@each
def test_its_card_says_it_to_readers(name):
    card, text = ship.read_card(MODELS[name]), (MODELS[name]/"README.md").read_text("utf-8")
    words = text.split("---\n", 2)[2]
    assert ship.write_card(card) == text
    for key in ("about", "data", "data_licence", "licence", "config", "command", "device", "torch",
                "judged", "drawing"):
        assert card[key] in words, key
    for metric in card["figures"]: assert f"| {metric} |" in words
    assert f"diffusion-sample --checkpoint {name}" in words and "(samples.png)" in words


@each
def test_its_images_are_the_same(name, monkeypatch):
    """The images that were kept when it was shipped, wherever that was, to one grey level: on
    1 thread or 2, in batches of 3 or 8, with oneDNN's packed convolutions and without."""
    kept = np.asarray(Image.open(MODELS[name]/"samples.png").convert("RGB")).astype(int)
    denoiser, prompts = load_denoiser(name), ship.read_card(MODELS[name])["prompts"]

    def differ(batch=8):
        images = ship.draw(denoiser, ship.KEPT, prompts, sample_batch_size=batch)
        grid = image_grid(images, ncol=ship.KEPT)
        assert grid.shape == kept.shape
        return abs(grid - kept).max()
    threads = torch.get_num_threads()
    try:
        for count, batch in ((1, 8), (2, 3)):
            torch.set_num_threads(count)
            assert differ(batch) <= 1, f"{count} threads, batches of {batch}"
    finally: torch.set_num_threads(threads)
    monkeypatch.setattr(speed, "_packable", lambda *_: False)
    with torch.backends.mkldnn.flags(enabled=False): assert differ() <= 1, "without oneDNN"


@each
def test_its_images_are_of_these_weights(name):
    "Weights that are off by a hundredth are seen."
    kept = np.asarray(Image.open(MODELS[name]/"samples.png").convert("RGB")).astype(int)
    denoiser, prompts = load_denoiser(name), ship.read_card(MODELS[name])["prompts"]
    with torch.no_grad():
        for p in denoiser.network.parameters(): p.mul_(1.01)
    grid = image_grid(ship.draw(denoiser, ship.KEPT, prompts), ncol=ship.KEPT)
    assert abs(grid - kept).max() > 1


# The script that ships one
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of two steps on 8 × 8 pixels, and a verdict on it."
    place = tmp_path_factory.mktemp("runs")
    cfg = load_config("quickstart", {
        "image_size": 8, "train_size": 32, "validation_size": 8, "test_size": 8, "batch_size": 4,
        "max_steps": 2, "steps": 2, "num_samples": 2, "progress": False, "device": "cpu",
        "base_channels": 8, "channel_multipliers": [1], "attention_resolutions": [],
        "norm_groups": 4, "num_res_blocks": 1, "patch_size": 1, "seed": 3,
        "data.root": str(place/"pictures"), "output_dir": str(place/"run")})
    trainer = Trainer(cfg)
    trainer.fit()
    verdict = place/"run"/"evaluation"/"step_00000002_seed_0"
    verdict.mkdir(parents=True)
    line = {"metric": "fd", "eye": "shapes-a@12345678", "value": 12.34567, "better": "lower",
            "floor": {"mean": 1.5, "sd": 0.1}}
    (verdict/"report.json").write_text(json.dumps({
        "results": [line], "samples": {"count": 1000}, "reference": {"count": 2000, "name": "test"},
        "sampling": {"seed": 0, "solver": "ddim", "steps": 2, "guidance_scale": 3.0}}))
    return place/"run"


SAID = {"about": "Nothing yet.", "data_licence": "none", "config": "quickstart",
        "command": "diffusion-train --config quickstart"}


@pytest.mark.parametrize("kind, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_ship(run, tmp_path, kind, dtype):
    folder = ship.ship(run, "tiny", kind, models=tmp_path, **SAID)
    assert folder == tmp_path/"tiny" and [*tmp_path.iterdir()] == [folder]
    there, was = load_checkpoint(folder), load_checkpoint(run)
    assert [*there.networks] == ["model"] and not there.emas and there.step == 2
    assert there.classes == was.classes and there.network_name is None
    for name, average in was.ema.items():
        assert torch.equal(there.model[name], average.to(dtype))
    assert any(not torch.equal(was.ema[k], was.model[k]) for k in was.ema)
    card = ship.read_card(folder)
    assert list(card) == list(ship.FACTS)
    assert card["figures"] == {"fd/shapes-a": {"value": 12.35, "floor": 1.5, "better": "lower"}}
    assert card["judged"] == ("1,000 images of seed 0 (ddim, 2 steps, guidance 3) beside 2,000 of "
                              "test")
    assert (card["seed"], card["steps"], card["rounding"]["kind"]) == (3, 2, kind)
    assert card["torch"] == torch.__version__ and "cpu" in card["device"]
    assert str(run.parent) not in "".join(p.read_text("utf-8", "replace") for p in folder.iterdir())
    cfg = there.config
    assert (cfg.data.root, cfg.logging.output_dir) == ("data", "outputs/shipped/tiny")
    again = ship.ship(run, "tiny", kind, models=tmp_path, **SAID)  # over the older one
    assert (again/"model.safetensors").read_bytes() == (folder/"model.safetensors").read_bytes()


def test_ship_asks_for_what_is_not_known(run, tmp_path):
    with pytest.raises(ValueError, match="does not say about, data_licence: say them by --about"):
        ship.ship(run, "tiny", models=tmp_path, config="quickstart", command="diffusion-train")
    bare = shutil.copytree(run, tmp_path/"bare", ignore=shutil.ignore_patterns("evaluation",
                                                                               "starts.jsonl"))
    with pytest.raises(ValueError, match="command, minutes, device, figures, judged"):
        ship.ship(bare, "tiny", models=tmp_path, about="", data_licence="", config="")
    with pytest.raises(ValueError, match="name: found 'Not so'"): ship.ship(run, "Not so")
    assert [p.name for p in tmp_path.iterdir()] == ["bare"]


def test_ship_refuses_what_is_too_large(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ship, "LIMIT", 1000)
    with pytest.raises(ValueError, match=r"tiny: found [\d,]+ bytes; allowed: 1,000"):
        ship.ship(run, "tiny", models=tmp_path, **SAID)
    monkeypatch.setattr(ship, "LIMITS", {"tiny": 100_000})
    assert ship.ship(run, "tiny", models=tmp_path, **SAID).is_dir()


def test_what_fp16_cannot_hold_is_refused_or_counted():
    large = {"a": torch.tensor([1., 1e5]), "steps": torch.tensor(70_000)}
    with pytest.raises(ValueError, match="fp16 cannot hold a, whose numbers exceed 65504"):
        ship.rounded(large, "fp16")
    assert ship.rounded(large, "bf16")["steps"].item() == 70_000
    tiny = {"a": torch.tensor([1e-9, 0., 1e-3, -1e-9])}
    assert ship.zeroed(tiny, ship.rounded(tiny, "fp16")) == 2
    assert ship.zeroed(tiny, ship.rounded(tiny, "bf16")) == 0


def test_a_command_loses_its_paths():
    words = ["diffusion-train", "--config", "fashion_mnist", "--data.root", "/home/me/data",
             "--output_dir=/mnt/big/runs/one/", "--resume", "~/runs/two", "--lr", "1e-3"]
    assert ship.without_paths(words) == (
        "diffusion-train --config fashion_mnist --data.root data --output_dir=one --resume two "
        "--lr 1e-3")


def test_a_run_that_was_resumed_does_not_know_its_minutes(run, tmp_path):
    found = ship.started(run)
    assert found["minutes"] >= 0 and found["device"].startswith("cpu, ")
    again = shutil.copytree(run, tmp_path/"again")
    (again/"starts.jsonl").write_text(2*(run/"starts.jsonl").read_text())
    assert ship.started(again) == {}


def test_settings_of_a_model_in_latents_name_the_model_itself():
    cfg = load_config("latent", {"data.autoencoder": "/somewhere/outputs/autoencoder"})
    assert ship.cleaned(cfg, "tiny").data.autoencoder == "tiny"
    with pytest.raises(ConfigError): load_config("latent", {"data.autoencoder": None})
    assert not ship.cleaned(load_config("quickstart"), "tiny").data.autoencoder
