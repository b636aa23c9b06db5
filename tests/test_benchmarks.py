"train.py and sample.py run, on networks so small that nothing is measured."
import json, os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from diffusion_model.config import load_config
from diffusion_model.dataset import create_dataset, sample_indices
from diffusion_model.pixels import to_uint8

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"benchmarks"))

import quality
import train
import turns
import watched


def smoke(script, folder, *more):
    "The rows that a benchmark writes in its smallest size."
    done = subprocess.run(
        [sys.executable, ROOT/"benchmarks"/script, "--smoke", "--threads", "1", "--device", "cpu",
         "--json", folder/"found.json", *more], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder/"found.json").read_text())
    (size,) = found["sizes"].values()
    for row in size["rows"]:
        assert row.get("failed") is None, f"{row['name']}: {row['failed']}"
        assert row["name"] in done.stdout and row["seconds"] > 0 and row["flops"] > 0
        assert row["peak"] >= row["libraries"] > 0
    assert set(size["limits"]) == {f"{a} {b}" for a in ("conv", "matmul") for b in ("fp32", "bf16")}
    assert found["machine"]["threads"] == 1 and found["machine"]["cpu"]
    assert not list(folder.glob("bench_*")), "a folder is left behind"
    return {row["name"]: row for row in size["rows"]}


@pytest.mark.parametrize("script, names", [
    ("train.py", ["ours, fp32", "ours, automatic", "ours, fp32, a whole step",
                  "ours, automatic, a whole step"]),
    ("sample.py", ["ours, fp32", "ours, automatic"])])
def test_ours_alone(tmp_path, script, names):
    assert list(smoke(script, tmp_path)) == names


@pytest.mark.parametrize("script, count", [("train.py", 9), ("sample.py", 5)])
def test_beside_peers_the_work_is_the_same(tmp_path, script, count):
    for name in ("diffusers", "denoising_diffusion_pytorch", "smalldiffusion"):
        pytest.importorskip(name)
    rows = smoke(script, tmp_path, "--peers")
    assert len(rows) == count
    ours, theirs = rows["ours, automatic"], rows[train.SHIPPED]
    for key in ("flops", "parameters"): assert ours[key] == theirs[key], key


def test_sizes_are_those_that_are_named():
    "6.47 M and 35.75 M parameters; the preset 1.86 M, as its peer."
    from diffusion_model.networks import create_network
    sizes = {"small": 6.47e6, "cifar": 35.75e6, "preset": 1.857e6}
    for size, count in sizes.items():
        model = train.config_of(size, 2, {}).model
        channels = 3 if size == "cifar" else 1
        assert turns.parameters(create_network(model, (channels, 32, 32))) == \
            pytest.approx(count, rel=2e-3)


def test_a_variant_that_fails_is_told_and_left_out():
    def broken(device): raise ImportError("no such library")
    def works(device): return turns.Work(lambda: None, lambda: 1000, 1, 10)
    variants = [turns.Variant("broken", broken, {}), turns.Variant("works", works, {})]
    (one, other), limits = turns.take_turns(variants, 2, 1, "cpu", smoke=True)
    assert "no such library" in one.failed and not one.seconds
    assert len(other.seconds) == 2 and other.flops == 1000
    assert turns.ratio(other, one) is None and turns.ratio(other, other) == 1
    assert turns.quickest([one, other]) is other and turns.quickest([one]) is None
    assert turns.row_of(one)["failed"] and limits["conv fp32"] > 0


def test_ratios_are_of_the_rounds():
    "A machine that is half as fast in one round changes no ratio."
    class Fake:
        def __init__(self, *seconds): self.seconds = list(seconds)
    assert turns.ratio(Fake(1, 2, 1), Fake(3, 6, 3)) == 3


def test_watched_shows_the_nearest_image_of_those_the_run_has_seen(tmp_path):
    cfg = load_config("quickstart", {"train_size": 64, "validation_size": 8, "test_size": 8})
    trainer = SimpleNamespace(cfg=cfg, step=1, datasets=create_dataset(cfg.data))
    seen = sample_indices(torch.arange(cfg.training.batch_size), 64, cfg.training.seed)
    known = to_uint8(trainer.datasets.train.batch(seen[:3]).images)
    found, distance = watched.nearest_seen(trainer, known)
    assert torch.equal(found, known) and distance.eq(0).all()
    unseen = torch.tensor(sorted({*range(64)} - {*seen.tolist()})[:3])
    found, distance = watched.nearest_seen(
        trainer, to_uint8(trainer.datasets.train.batch(unseen).images))
    assert (distance > 5).all(), "an image that no step has seen is given as its own neighbour"


def test_watched_draws_rows(tmp_path):
    red = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    red[:, 0] = 255
    watched.picture([("raw", red), None, ("averaged", red)], tmp_path/"rows.png")
    page = Image.open(tmp_path/"rows.png").convert("RGB")
    wide, high = 2*4*watched.ENLARGED, 4*watched.ENLARGED
    assert page.width >= 96 + wide and page.height >= 2*high + 12
    assert sum(n for n, colour in page.getcolors(page.width*page.height)
               if colour == (255, 0, 0)) == 2*wide*high


def test_each_change_of_the_study_changes_something():
    shipped = load_config("fashion_mnist").model_dump()
    for name, change in quality.STUDY.items():
        assert load_config("fashion_mnist", change).model_dump() != shipped, name


def test_quality_names_what_it_cannot_do(tmp_path, capsys):
    words = ["--root", "data", "--out", str(tmp_path)]
    with pytest.raises(SystemExit): quality.main([*words, "--only", "nothing"])
    assert "--only: found nothing; allowed are beginnings of the shipped config;" in \
        capsys.readouterr().err
    here = quality.folder(tmp_path, quality.OURS)
    here.mkdir()
    (here/"facts.json").write_text(json.dumps({"asked": [60, 2000, {}]}))
    with pytest.raises(SystemExit, match="was made with other --seconds"): quality.main(words)
