"The two commands as a user runs them: in processes of their own."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent/"shared"/"data"
SMALL = ["--base_channels", "16", "--norm_groups", "8", "--attention_resolutions", "[]",
         "--channel_multipliers", "1,2", "--image_size", "16", "--patch_size", "2", "--batch_size",
         "8", "--steps", "3", "--num_samples", "4", "--num_res_blocks", "1", "--log_every", "1",
         "--device", "cpu"]


def run(command, *words, cwd=ROOT, **kw):
    code = ("import sys; "
            f"from diffusion_model.cli import {command}_command as c; sys.exit(c(sys.argv[1:]))")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
                        "PYTHONWARNINGS": "default"}
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=cwd, env=env,
                          text=True, capture_output=True, timeout=240, **kw)


def losses(folder):
    lines = [json.loads(line) for line in (Path(folder)/"metrics.jsonl").read_text().splitlines()]
    return {m["step"]: m["loss"] for m in lines if "loss" in m}


def train(out, *words):
    return run("train", "--config", "quickstart", *SMALL, "--output_dir", out, *words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")/"quick"
    done = train(out, "--max_steps", "20", "--checkpoint_every", "7")
    assert done.returncode == 0, done.stderr
    return out


def test_run_directory(trained):
    there = {p.relative_to(trained).as_posix() for p in trained.rglob("*")}
    assert {"config.yaml", "metrics.jsonl", "loss.png", "samples/film.gif",
            "samples/step_00000020.png", "checkpoints/step_00000014/model.safetensors",
            "checkpoints/step_00000020/manifest.json"} <= there
    assert list(losses(trained)) == list(range(1, 21))


@pytest.mark.fault(3)
def test_kill_and_resume_gives_the_same_losses(trained, tmp_path, background):
    "Killed without warning, a run goes on at its last checkpoint as if nothing had been."
    code = ("import sys; "
            "from diffusion_model.cli import train_command as c; sys.exit(c(sys.argv[1:]))")
    out = tmp_path/"killed"
    words = ["--config", "quickstart", *SMALL, "--output_dir", str(out), "--checkpoint_every", "7"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = background([sys.executable, "-c", code, *words, "--max_steps", "100000"], cwd=ROOT,
                         env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.time() + 120
    while not (out/"checkpoints"/"step_00000014"/"manifest.json").exists() and time.time() < until:
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = losses(out)
    done = run("train", "--resume", out, "--max_steps", "60")
    assert done.returncode == 0, done.stderr
    resumed = int(done.stdout.split("resumed at step ")[1].split()[0])
    assert resumed >= 14 and resumed % 7 == 0 and max(before) - resumed <= 7 + 1
    assert list(losses(out)) == list(range(1, 61))


def test_resumed_losses_equal_an_uninterrupted_run(trained, tmp_path):
    import shutil
    out = tmp_path/"again"
    shutil.copytree(trained, out)
    shutil.rmtree(out/"checkpoints"/"step_00000020")  # as if killed after step 14's checkpoint
    done = run("train", "--resume", out)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 14" in done.stdout
    assert losses(out) == losses(trained)
    same = [(folder/"checkpoints"/"step_00000020"/"model.safetensors").read_bytes()
            for folder in (out, trained)]
    assert same[0] == same[1]


@pytest.mark.fault(4)
@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_stops(tmp_path, background, sent, code):
    out = tmp_path/"stopped"
    source = ("import sys; "
              "from diffusion_model.cli import train_command as c; sys.exit(c(sys.argv[1:]))")
    process = background(
        [sys.executable, "-c", source, "--config", "quickstart", *SMALL, "--output_dir", str(out),
         "--max_steps", "100000"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics, until = out/"metrics.jsonl", time.time() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2) and time.time() < until:
        time.sleep(0.02)
    process.send_signal(sent)
    printed, complained = process.communicate(timeout=60)
    assert process.returncode == code, complained
    step = int(printed.split("stopped at step ")[1].split(",")[0])
    assert (out/"checkpoints"/f"step_{step:08d}"/"manifest.json").exists()


def test_sample_writes_files(trained, tmp_path):
    done = run("sample", "--checkpoint", trained, "--num_samples", 5, "--steps", 2, "--labels",
               "star,0", "--film", "--solver", "ddpm", "--output_dir", tmp_path/"out")
    assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in (tmp_path/"out").iterdir())
    assert names == ["00000_star.png", "00001_disc.png", "00002_star.png", "00003_disc.png",
                     "00004_star.png", "film.gif", "grid.png"]
    assert Image.open(tmp_path/"out"/"00000_star.png").size == (16, 16)


def test_a_dry_run_leaves_nothing(tmp_path):
    out = tmp_path/"here"/"quick"
    done = train(out, "--dry_run", "--max_steps", "500")
    assert (done.returncode, done.stderr) == (0, "")
    assert not any(tmp_path.iterdir())
    for word in ("parameters", "activations", "images/s", "memory: ", "500 steps are left: about",
                 "nothing was written"): assert word in done.stdout, done.stdout
    refused = train(out, "--dry-run", "--model.num_classes", "5")
    assert refused.returncode == 2 and "shapes has 8 classes" in refused.stderr


def test_a_dry_run_of_a_resumed_run(trained):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*")}
    done = run("train", "--resume", trained, "--dry_run", "--max_steps", "30")
    assert done.returncode == 0, done.stderr
    assert "resumed at step 20" in done.stdout and "10 steps are left" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in trained.rglob("*")} == before
    again = run("train", "--config", "quickstart", *SMALL, "--output_dir", trained, "--dry_run")
    assert again.returncode == 2 and "already holds a run" in again.stderr  # as in a real run


def test_the_warm_up_is_not_timed():
    from types import SimpleNamespace

    from diffusion_model.cli import _timed_steps
    steps = []
    def step(batch):
        steps.append(batch)
        time.sleep(0.3 if len(steps) == 1 else 0.001)
        return {"loss": 1/len(steps)}
    class Loader:
        start = 0
        def __iter__(self): yield from range(self.start, 100)
    trainer = SimpleNamespace(
        loader=Loader(), step=7, train_step=step,
        world=SimpleNamespace(max=lambda value: [value]))
    times, loss = _timed_steps(trainer, most=4)
    assert steps == [7, 8, 9, 10, 11] and loss == 0.2 and max(times) < 0.2 and len(times) == 4


def test_a_dry_run_of_two_processes(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m",
         "diffusion_model.train", "--config", "quickstart", *SMALL, "--dry_run", "--output_dir",
         str(tmp_path/"out")], cwd=ROOT, env=env, text=True, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing was written") == 1 and "a step with 4 images" in done.stdout
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command, words, says", [
    ("train", ["--config", "quikstart"], ["quikstart", "did you mean quickstart?"]),
    ("train", ["--config", "quickstart", "--lerning_rate", "1"],
     ["did you mean training.learning_rate?"]),
    ("train", ["--config", "quickstart", "--batch_size", "many"],
     ["training.batch_size", "'many'", "a whole number"]),
    ("train", ["--config", "quickstart", "--image_size", "30"], ["data.image_size", "24 or 32"]),
    ("train", ["--config", "quickstart", "--max_steps", "0", "--dropout", "2"],
     ["training.max_steps", "model.dropout"]),
    ("train", ["--config", "fashion_mnist", "--data.root", "nowhere"],
     ["nowhere", "--data.download true"]),
    ("train", ["--config", "image_folder", "--data.root", "nowhere"], ["nowhere"]),
    ("train", ["--config", "quickstart", "--device", "cuda:77"], ["cuda:77", "auto"]),
    ("train", ["--resume", "nowhere"], ["nowhere"]),
    ("sample", ["--checkpoint", "nowhere"], ["nowhere"]),
])
def test_refusals(tmp_path, command, words, says):
    done = run(command, *words, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for word in says: assert word in done.stderr, done.stderr
    assert not list(tmp_path.rglob("step_*"))


def test_help_names_every_field():
    done = run("train", "--help")
    assert done.returncode == 0
    for word in ("--training.learning_rate", "--model.patch_size", "--resume", "quickstart"):
        assert word in done.stdout


@pytest.mark.skipif(not DATA.exists(), reason="the real data sets are not beside the project")
@pytest.mark.parametrize("config, root", [("fashion_mnist", "."),
                                          ("image_folder", "noto-emoji/72")])
def test_real_data(tmp_path, config, root):
    done = run("train", "--config", config, "--data.root", DATA/root, *SMALL, "--max_steps", 4,
               "--output_dir", tmp_path/"run")
    assert done.returncode == 0, done.stderr
    done = run("sample", "--checkpoint", tmp_path/"run", "--num_samples", 16, "--output_dir",
               tmp_path/"out")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path/"out").glob("0*.png"))) == 16
