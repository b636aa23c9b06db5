"Faults that were found in the two commands, and mended."
import os, shutil, signal, subprocess, sys, time, warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import BaseModel

from diffusion_model import cli
from diffusion_model.cli import parse_labels, train_command, write_samples
from diffusion_model.config import load_config, load_saved_config, save_config
from diffusion_model.generation import Drawn

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = {"base_channels": 8, "norm_groups": 4, "attention_resolutions": "[]", "num_res_blocks": 1,
        "channel_multipliers": "[1]", "image_size": 8, "batch_size": 6, "max_steps": 4, "steps": 2,
        "train_size": 30, "validation_size": 6, "test_size": 6, "device": "cpu", "num_samples": 4,
        "warmup_steps": 2, "checkpoint_every": 2, "log_every": 1, "progress": "false"}


def words(folder, **change):
    return ["--config", "quickstart"] + [
        f"--{k}={v}" for k, v in (TINY | {"output_dir": folder} | change).items()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    run = tmp_path_factory.mktemp("trained")/"run"
    show = warnings.showwarning
    assert train_command(words(run)) == 0
    warnings.showwarning = show
    return run


@pytest.fixture
def run(trained, tmp_path):
    "A copy of a run of four steps, with checkpoints of steps 2 and 4."
    return Path(shutil.copytree(trained, tmp_path/"run"))


@pytest.fixture
def no_trainer(monkeypatch):
    "Neither data nor network may be built before the mistake is found."
    def refuse(*_, **__): raise AssertionError("the trainer was built")
    monkeypatch.setattr("diffusion_model.training.Trainer", refuse)


def python(code, *argv, **environment):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code, *map(str, argv)],
                          env=env, capture_output=True, timeout=120)


TRAIN = "import sys; from diffusion_model.cli import train_command as c; sys.exit(c(sys.argv[1:]))"
SAMPLE = TRAIN.replace("train_command", "sample_command")


# -- 2: a run that was killed in its first save

@pytest.mark.mended(2)
@pytest.mark.parametrize("resume", [[], ["--resume"], ["--resume", "PATH"]])
def test_an_unfinished_first_checkpoint_is_no_run(tmp_path, command, resume):
    "It can be started, and resumed, by each of the words that one would try."
    run = tmp_path/"run"
    (run/"checkpoints"/"step_00000002.tmp").mkdir(parents=True)
    (run/"status.json").write_text("{}")
    save_config(load_config("quickstart", words(run)[2:]), run/"config.yaml")
    given = ["--resume", run] if resume[1:] else words(run) + resume
    command.train(*given)
    assert command.code == 0, command.err
    assert ("starting at step 0" in command.out) == bool(resume)
    assert (run/"checkpoints"/"step_00000004"/"manifest.json").exists()


def test_what_counts_as_a_finished_checkpoint(tmp_path):
    folder = tmp_path/"checkpoints"
    for name in ("step_00000010", "step_00000002.old", "step_00000012.tmp", "step_", "other"):
        (folder/name).mkdir(parents=True)
    (folder/"step_00000099").write_text("a file")
    assert [p.name for p in cli._steps(tmp_path)] == ["step_00000002.old", "step_00000010"]
    assert cli._steps(tmp_path/"nowhere") == []


@pytest.mark.mended(2)
def test_a_run_with_a_finished_checkpoint_stays_one(run, command):
    command.train(*words(run))
    command.says(2, f"logging.output_dir: '{run}' already holds a run", "--resume")
    (run/"checkpoints"/"step_00000009.tmp").mkdir()
    command.train("--resume", run, "--max_steps", 5)
    assert command.code == 0 and "resumed at step 4" in command.out
    assert "training.max_steps: 4 -> 5" in command.out.splitlines()
    (run/"checkpoints"/"step_00000009.tmp").mkdir(exist_ok=True)
    command.train("--resume", run/"checkpoints"/"step_00000009.tmp")
    command.says(2, "interrupted save", f"use {run}")


def test_resume_without_a_path_is_the_configs_own_run(run, command):
    command.train(*words(run), "--resume")
    assert command.code == 0 and "resumed at step 4" in command.out
    assert "already trained for 4 steps" in command.out


def test_without_resume_nothing_is_resumed(run, monkeypatch):
    "Not even in a process that does not look whether the place is free."
    monkeypatch.setenv("RANK", "1")
    args = cli.train_parser().parse_args(["--config", "quickstart"])
    assert cli._train_config(args, [f"--output_dir={run}"])[1] is None


def test_a_config_that_is_named_wins_over_the_runs_own(run):
    args = cli.train_parser().parse_args(["--config", "quickstart", "--resume", str(run)])
    cfg, path = cli._train_config(args, [f"--output_dir={run}"])
    assert cfg == load_config("quickstart", {"output_dir": str(run)}) and path == run


# -- 17: places that cannot be

@pytest.mark.mended(17)
@pytest.mark.parametrize("make, says", [
    (lambda d: (d/"file").write_text("mine") and d/"file", ["is a file"]),
    (lambda d: (d/"file").write_text("mine") and d/"file"/"run"/"a", ["file' is a file"]),
    (lambda d: (d/"loop").symlink_to(d/"loop") or d/"loop"/"run", ["link"]),
    (lambda d: (d/"loop").symlink_to(d/"loop") or d/"loop", ["link"]),
    (lambda d: (d/"gone").symlink_to(d/"nowhere") or d/"gone", ["link that leads nowhere"]),
    (lambda d: d/("x"*300), ["name is too long"]),
    (lambda d: Path("/proc/run"), []),
])
def test_an_output_dir_that_cannot_be(tmp_path, command, no_trainer, make, says):
    "Found before data and network are built, in plain words; nothing is left behind or changed."
    place = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    command.train(*words(place))
    command.says(2, f"logging.output_dir: '{place}' cannot be written to: ", "--output_dir", *says)
    assert "Errno" not in command.err and sorted(tmp_path.rglob("*")) == before
    if (tmp_path/"file").exists(): assert (tmp_path/"file").read_text() == "mine"


@pytest.mark.mended(17)
@pytest.mark.parametrize("number, says", [(13, "you may not write there"), (30, "only be read"),
                                          (28, "the disk is full")])
def test_an_output_dir_that_cannot_be_written(
        tmp_path, command, no_trainer, monkeypatch, number, says):
    def refuse(*_, **__): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(cli.tempfile, "TemporaryFile", refuse)
    command.train(*words(tmp_path/"a"/"run"))
    command.says(2, says, "--output_dir")
    assert not (tmp_path/"a").exists()


@pytest.mark.mended(17)
def test_trying_a_place_leaves_nothing_behind(tmp_path, command, monkeypatch):
    def missing(*_): raise FileNotFoundError("no data")
    monkeypatch.setattr("diffusion_model.training.Trainer", missing)
    (tmp_path/"there").mkdir()
    for place in ("there", "a/b/c"):
        command.train(*words(tmp_path/place))
        command.says(2, "no data")
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]


@pytest.mark.mended(17)
@pytest.mark.parametrize("config", ["config.yaml", "other.yaml"])
def test_a_config_of_the_users_is_never_overwritten(tmp_path, command, no_trainer, config):
    "`--config exp/config.yaml --output_dir exp`, or another one while exp/config.yaml is there."
    text = "# my notes\nbase: quickstart\ntraining: {seed: 1}\n"
    (tmp_path/"exp").mkdir()
    for name in ("config.yaml", "other.yaml"): (tmp_path/"exp"/name).write_text(text)
    for resume in ([], ["--resume"]):
        command.train("--config", tmp_path/"exp"/config, "--output_dir", tmp_path/"exp", *resume)
        command.says(2, "config.yaml that no run has written", "--output_dir")
    assert (tmp_path/"exp"/"config.yaml").read_text() == text


@pytest.mark.mended(17)
def test_a_run_may_be_resumed_with_its_own_config(run, command):
    command.train("--config", run/"config.yaml", "--resume", run, "--output_dir", run,
                  "--max_steps", 5)
    assert command.code == 0, command.err


@pytest.mark.mended(17)
def test_a_run_is_not_continued_over_another(run, tmp_path, command):
    other = shutil.copytree(run, tmp_path/"other")
    command.train("--resume", run, "--output_dir", other)
    command.says(2, f"'{other}' already holds a run")
    command.train("--resume", run/"checkpoints"/"step_00000002")
    command.says(2, "not the newest", "step_00000004")
    command.train("--resume", run/"checkpoints"/"step_00000002", "--output_dir", tmp_path/"new",
                  "--max_steps", 3)
    assert command.code == 0 and "resumed at step 2" in command.out


@pytest.mark.mended(17)
def test_an_output_dir_inside_the_data_is_warned_of(tmp_path, command, monkeypatch):
    def missing(*_): raise FileNotFoundError("no data")
    monkeypatch.setattr("diffusion_model.training.Trainer", missing)
    folder = dict(dataset="folder", root=tmp_path/"data", num_classes=0, guidance_scale=1)
    for name, warned in (("data/run", True), ("run", False), ("data-run", False)):
        command.train(*words(tmp_path/name, **folder))
        assert ("is inside data.root" in command.err) == warned
    command.train(*words(tmp_path/"data"/"run", root=tmp_path/"data"))  # figures are in no folder
    assert "is inside" not in command.err


# -- 18: what is resumed

@pytest.mark.mended(18)
@pytest.mark.parametrize("damage, word", [
    (Path.unlink, "gone"), (lambda p: p.write_text(" \n"), "empty")])
def test_a_run_without_its_config(run, command, damage, word):
    "The newest checkpoint has a copy; a checkpoint without one has the run's."
    damage(run/"config.yaml")
    command.train("--resume", run, "--max_steps", 5)
    assert command.code == 0 and "resumed at step 4" in command.out, command.err
    assert f"{run/'config.yaml'} is {word}: going on with the settings in" in command.err
    assert "step_00000004" in command.err
    cfg, _ = load_saved_config(run/"config.yaml")  # and it is there again
    assert (cfg.model.base_channels, cfg.data.image_size, cfg.training.max_steps) == (8, 8, 5)
    assert Path(cfg.logging.output_dir) == run


@pytest.mark.mended(18)
def test_a_checkpoint_names_its_own_settings_first(run, command):
    text = (run/"config.yaml").read_text()
    assert "learning_rate: 0.004" in text
    (run/"config.yaml").write_text(text.replace("learning_rate: 0.004", "learning_rate: 0.5"))
    args = cli.train_parser().parse_args(["--resume", str(run/"checkpoints"/"step_00000004")])
    cfg, path = cli._train_config(args, [])
    assert cfg.training.learning_rate == 0.004 and path == run/"checkpoints"/"step_00000004"
    args = cli.train_parser().parse_args(["--resume", str(run)])
    assert cli._train_config(args, [])[0].training.learning_rate == 0.5


@pytest.mark.mended(18)
def test_a_checkpoint_that_is_in_no_run(run, tmp_path, command):
    "A released one, say: it goes on where its config says, not inside itself."
    step = shutil.copytree(run/"checkpoints"/"step_00000004", tmp_path/"step_00000004")
    args = cli.train_parser().parse_args(["--resume", str(step)])
    cfg, path = cli._train_config(args, [f"--output_dir={tmp_path/'new'}"])
    assert (cfg.logging.output_dir, path) == (str(tmp_path/"new"), step)
    there = load_saved_config(step/"config.yaml")[0].logging.output_dir
    assert cli._own_config(step, []).logging.output_dir == there
    (step/"config.yaml").unlink()
    command.train("--resume", step)
    command.says(2, "has no settings left")


def test_a_run_of_0_1_0_is_told_what_it_did_not_know(tmp_path, command):
    "And so is whatever is not as it was."
    run = shutil.copytree(ROOT/"tests"/"fixtures"/"run_0_1_0", tmp_path/"run")
    command.train("--resume", run, "--max_steps", 7)
    assert command.code == 0, command.err
    for line in ("model.name: not known then; 'unet'", "training.max_steps: 6 -> 7"):
        assert line in command.out.splitlines()


@pytest.mark.mended(18)
def test_settings_that_are_nowhere(tmp_path, command):
    (tmp_path/"run"/"checkpoints").mkdir(parents=True)
    for text in (None, ""):
        if text is not None: (tmp_path/"run"/"config.yaml").write_text(text)
        command.train("--resume", tmp_path/"run")
        word = "empty" if text == "" else "gone"
        command.says(2, "has no settings left", word, "--config quickstart")


@pytest.mark.mended(18)
@pytest.mark.parametrize("given, says", [
    ("config.yaml", ["is a file", "name the folder"]),
    ("checkpoints/step_00000004/model.safetensors", ["is a file", "step_00000004"]),
    ("nowhere", ["no such checkpoint or run"]), ("samples", ["is no run"]),
    ("..", ["is no run", "there are runs in it", "run"])])
def test_a_resume_path_that_is_none(run, command, no_trainer, given, says):
    command.train("--resume", run/given)
    command.says(2, "--resume: ", *says)


@pytest.mark.mended(18)
@pytest.mark.parametrize("argv, says", [
    (["--resume", ""], ["--resume: found ''", "--resume outputs/quickstart"]),
    (["--resume="], ["--resume: found ''"]),
    ([], ["--config quickstart", "cifar10"]),
    (["--max_steps", "5"], ["no --config was named", "--config quickstart"]),
])
def test_words_that_say_too_little(tmp_path, monkeypatch, command, argv, says):
    monkeypatch.chdir(tmp_path)
    command.train(*argv)
    command.says(2, *says)
    assert not list(tmp_path.iterdir())


def test_paths_in_the_home_directory(run, command, monkeypatch):
    monkeypatch.setenv("HOME", str(run.parent))
    command.train("--resume", "~/run")
    assert command.code == 0 and "resumed at step 4" in command.out
    command.sample("--checkpoint", "~/run", "--output_dir", "~/out", "--num_samples", 1)
    assert command.code == 0 and (run.parent/"out"/"grid.png").exists()


@pytest.mark.mended(18)
def test_missing_data_is_told_without_a_hint_where_a_config_was_named(tmp_path, command):
    command.train("--config", "fashion_mnist", "--root", tmp_path)
    assert command.code == 2 and "no --config was named" not in command.err


@pytest.mark.mended(18)
def test_the_folder_of_checkpoints_is_the_run(run, command):
    command.train("--resume", run/"checkpoints")
    assert command.code == 0 and "already trained for 4 steps" in command.out
    assert not (run/"checkpoints"/"config.yaml").exists()
    command.sample("--checkpoint", run/"checkpoints", "--num_samples", 1)
    assert command.code == 0


# -- 19: sampling

@pytest.mark.mended(19)
@pytest.mark.parametrize("argv, field", [
    (["--schedule", "cosine"], "diffusion.schedule"), (["--data.mean", "0.1"], "data.mean"),
    (["--base_channels", "16"], "model.base_channels"), (["--image_size=16"], "data.image_size"),
    (["--learning_rate", "1"], "training.learning_rate"),
    (["--progress", "true"], "logging.progress")])
def test_what_is_not_samplings_is_refused(trained, command, argv, field):
    command.sample("--checkpoint", trained, *argv)
    command.says(2, f"{field}: was settled when the model was trained", "--solver", "--device",
                 "--labels")


@pytest.mark.mended(19)
def test_all_wrong_words_of_a_sampling_come_together(trained, command):
    command.sample("--checkpoint", trained, "--schedule", "cosine", "--data.std=2", "--spacng", "a")
    command.says(2, "diffusion.schedule: was", "data.std: was", "did you mean sampling.spacing?")


@pytest.mark.mended(19)
def test_what_is_samplings_is_taken(trained, tmp_path, command, monkeypatch):
    import diffusion_model.generation as generation
    seen = {}
    real = generation.generate
    def generate(denoiser, n, cond, seed, sampling, **kw):
        device = next(denoiser.network.parameters()).device.type
        seen.update(n=n, seed=seed, s=sampling, cond=cond, device=device)
        return real(denoiser, n, cond, seed, sampling, **kw)
    monkeypatch.setattr(generation, "generate", generate)
    command.sample(
        "--checkpoint", trained, "--output_dir", tmp_path/"out", "--spacing", "karras",
        "--no-clip_x0", "--solver", "ddim", "--eta", "0.5", "--guidance_scale", "2", "--steps", "3",
        "--num-samples", "3", "--seed", "7", "--sample_batch_size", "2", "--device", "cpu",
        "--labels", "none,ring")
    assert command.code == 0, command.err
    s = seen["s"]
    assert (s.spacing, s.clip_x0, s.solver, s.eta) == ("karras", False, "ddim", 0.5)
    assert s.guidance_scale == 2
    assert (s.steps, s.num_samples, s.sample_batch_size, seen["n"], seen["seed"]) == (3, 3, 2, 3, 7)
    assert seen["cond"].tolist() == [-1, 1, -1] and seen["cond"].dtype == torch.int64
    assert seen["device"] == "cpu"
    assert sorted(p.name for p in (tmp_path/"out").iterdir()) == [
        "00000.png", "00001_ring.png", "00002.png", "grid.png"]
    assert command.out.strip() == f"3 images and grid.png in {tmp_path/'out'}"


@pytest.mark.mended(19)
def test_images_are_written_as_they_come(tmp_path):
    "When the next batch is asked for, the last one is on the disk; the grid holds the first 64."
    def stream():
        for first in (0, 50, 100):
            assert len(list(tmp_path.glob("*.png"))) == first
            yield Drawn(first, torch.full((50, 3, 4, 4), first, dtype=torch.uint8), [])
    assert write_samples(stream(), tmp_path, ["_a"]*150) == (150, 0)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == [f"{i:05d}_a.png" for i in range(150)] + ["grid.png"]
    assert (np.asarray(Image.open(tmp_path/"00120_a.png")) == np.full((4, 4, 3), 100)).all()
    assert Image.open(tmp_path/"grid.png").size == (8*6 + 2, 8*6 + 2)  # 8 by 8 of 64


@pytest.mark.mended(19)
def test_numbers_in_file_names_are_as_long_as_they_must_be(tmp_path):
    def stream(): yield Drawn(99_999, torch.zeros((2, 1, 4, 4), dtype=torch.uint8), [])
    write_samples(stream(), tmp_path, [""]*100_001)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["099999.png", "100000.png"]


@pytest.mark.mended(19)
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_keeps_what_is_written(tmp_path, sent):
    "At any moment: whole files, the grid, the old handlers back, and the number of the signal."
    usual = signal.default_int_handler if sent == signal.SIGINT else signal.SIG_DFL
    outside = signal.signal(sent, usual)  # a test that runs in the background ignores Ctrl-C
    def stream():
        yield Drawn(0, torch.zeros((5, 3, 4, 4), dtype=torch.uint8), ["film"])
        os.kill(os.getpid(), sent)
        time.sleep(5)
        raise AssertionError("the signal did not come")
    film = [torch.zeros((2, 3, 4, 4), dtype=torch.uint8)]*2
    def with_film():
        for drawn in stream(): yield drawn._replace(film=film)
    try:
        assert write_samples(with_film(), tmp_path, [""]*100) == (5, sent)
        assert signal.getsignal(sent) == usual
    finally: signal.signal(sent, outside)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"0000{i}.png" for i in range(5)), "film.gif", "grid.png"]


@pytest.mark.mended(19)
def test_a_signal_in_the_middle_of_a_file_leaves_no_half(tmp_path, monkeypatch):
    import diffusion_model.plotting as plotting
    def slow(image, path, **kw):
        Path(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(plotting, "save_image", slow)
    def stream(): yield Drawn(0, torch.zeros((5, 3, 4, 4), dtype=torch.uint8), [])
    assert write_samples(stream(), tmp_path, [""]*5) == (0, signal.SIGTERM)
    assert not list(tmp_path.iterdir())


@pytest.mark.mended(19)
def test_an_ignored_signal_stays_ignored(tmp_path):
    "nohup: a closed terminal is not to stop it."
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli._stoppable(): assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally: signal.signal(signal.SIGHUP, old)


@pytest.mark.mended(19)
def test_a_sampling_that_is_stopped_says_so(trained, tmp_path):
    "As a cluster does it: the exit code, a sentence, and what was drawn until then."
    out = tmp_path/"out"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    argv = ["--checkpoint", trained, "--output_dir", out, "--num_samples", 100_000,
            "--sample_batch_size", 4]
    process = subprocess.Popen([sys.executable, "-c", SAMPLE, *map(str, argv)], env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.time() + 100
    while not (out/"00009_ring.png").exists() and time.time() < until: time.sleep(0.02)
    process.terminate()
    printed, complained = process.communicate(timeout=60)
    assert process.returncode == 143, complained
    done = int(printed.split("stopped: ")[1].split()[0])
    assert done >= 10 and "of 100000 images" in printed and str(out) in printed
    files = sorted(p.name for p in out.iterdir())
    assert len(files) == done + 1 and files[-1] == "grid.png"
    for name in files: Image.open(out/name).load()


@pytest.mark.mended(19)
def test_weights_that_are_not_finite_draw_nothing(run, tmp_path, command):
    from diffusion_model.checkpoint import load_checkpoint, save_checkpoint
    checkpoint = load_checkpoint(run)
    state = {k: torch.full_like(v, float("nan")) for k, v in checkpoint.model.items()}
    save_checkpoint(tmp_path/"nan", 1, state, None, None, checkpoint.config,
                    classes=checkpoint.classes)
    command.sample("--checkpoint", tmp_path/"nan", "--output_dir", tmp_path/"out")
    assert command.code != 0 and "not finite" in command.err
    assert not list(tmp_path.glob("out/*.png"))


@pytest.mark.mended(19)
def test_two_samplings_do_not_mix(run, tmp_path, command):
    "Unnamed, each has a folder of its own; a named one is refused, or emptied when told."
    for labels in ("star", "ring", "star"):
        assert command.sample("--checkpoint", run, "--labels", labels).code == 0
    folders = sorted(p for p in (run/"samples").iterdir() if p.is_dir())
    name = "step_00000004_ddim_2_seed_0"
    assert [p.name for p in folders] == [name, f"{name}_2", f"{name}_3"]
    assert [sorted(q.name for q in p.glob("00000*")) for p in folders] == [
        ["00000_star.png"], ["00000_ring.png"], ["00000_star.png"]]
    out = tmp_path/"out"
    out.mkdir()
    (out/"notes.txt").write_text("mine")
    (out/"0_mine.png").write_text("mine")
    assert command.sample("--checkpoint", run, "--labels", "star", "--output_dir", out).code == 0
    command.sample("--checkpoint", run, "--labels", "ring", "--output_dir", out, "--num_samples", 2)
    command.says(2, f"'{out}' holds samples already", "--overwrite")
    assert len(list(out.glob("*_star.png"))) == 4 and not list(out.glob("*_ring.png"))
    command.sample("--checkpoint", run, "--labels", "ring", "--output_dir", out,
                   "--num_samples", 2, "--overwrite", "--film")
    assert command.code == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "00000_ring.png", "00001_ring.png", "0_mine.png", "film.gif", "grid.png", "notes.txt"]
    assert command.sample("--checkpoint", run, "--labels", "disc", "--overwrite").code == 0
    assert [q.name for q in folders[0].glob("00000*")] == ["00000_disc.png"]
    assert not list((run/"samples").glob("*_4"))


@pytest.mark.mended(19)
def test_samples_are_never_put_among_the_data(run, tmp_path, command):
    data = tmp_path/"data"
    data.mkdir()
    for file in run.glob("checkpoints/*/config.yaml"):
        cfg, _ = load_saved_config(file, {"dataset": "folder", "root": str(data)})
    args = cli.sample_parser().parse_args(["--checkpoint", "x", "--output_dir", str(data/"out")])
    step = run/"checkpoints"/"step_00000004"
    with pytest.raises(ValueError, match="inside data.root"): cli._sample_folder(args, step, cfg)
    args.output_dir = str(tmp_path/"out")
    assert cli._sample_folder(args, step, cfg) == tmp_path/"out"
    inside = data/"run"/"checkpoints"/"step_00000004"
    args.output_dir = None
    assert cli._sample_folder(args, inside, cfg).parent == data/"run"/"samples"


@pytest.mark.mended(19)
@pytest.mark.parametrize("given, says", [
    ("", "no such checkpoint or run: ''"), ("nowhere", "no such"),
    ("config.yaml", "is a file: pass the checkpoint's folder")])
def test_a_checkpoint_that_is_none(run, command, given, says):
    command.sample("--checkpoint", run/given if given else "")
    command.says(2, "--checkpoint: ", says)


@pytest.mark.mended(17)
def test_the_place_of_samples_is_checked(run, tmp_path, command):
    (tmp_path/"file").write_text("mine")
    command.sample("--checkpoint", run, "--output_dir", tmp_path/"file")
    command.says(2, "--output_dir: ", "is a file")


@pytest.mark.parametrize("null, shape", [(torch.tensor([1., 2.]), (3, 2)), (5., (3,))])
def test_a_network_without_labels_is_given_its_null(null, shape):
    for cond in (null, {"a": null}):
        found = cli._condition(SimpleNamespace(null_cond=cond), {}, 3)
        found = found["a"] if isinstance(cond, dict) else found
        assert found.shape == shape and (found == torch.as_tensor(null)).all()
    assert cli._condition(SimpleNamespace(null_cond=None), {}, 3) is None
    labels = {"label": torch.tensor([2, 0, -1])}
    assert cli._condition(SimpleNamespace(null_cond=-1), labels, 3).tolist() == [2, 0, -1]


def test_the_best_and_the_seed(run, tmp_path, command, monkeypatch):
    "--best and --seed reach what they are for; the seed and the checkpoint name the folder."
    import diffusion_model.checkpoint as checkpoint
    asked = []
    real = checkpoint.load_checkpoint
    def load(path, **kw):
        asked.append(kw.get("best"))
        return real(path, **kw | {"best": False})
    monkeypatch.setattr(checkpoint, "load_checkpoint", load)
    for words in (["--best"], ["--seed", 3], []): command.sample("--checkpoint", run, *words)
    assert asked == [True, False, False]
    folders = [p for p in (run/"samples").iterdir() if p.is_dir()]
    names = {p.name: (p/"00000_disc.png").read_bytes() for p in folders}
    name = "step_00000004_ddim_2_seed"
    assert set(names) == {f"{name}_0", f"{name}_3", f"{name}_0_2"}
    assert names[f"{name}_0"] == names[f"{name}_0_2"] != names[f"{name}_3"]


def test_files_are_named_by_their_class():
    assert cli._file_names(["a", "cats, dogs/x"], [1, 0, -1], 3) == ["_cats-dogs-x", "_a", ""]
    assert cli._file_names(None, [1, 0], 2) == cli._file_names(["a"], None, 2) == ["", ""]


# -- 20: names of classes

@pytest.mark.mended(20)
@pytest.mark.parametrize("text, labels", [
    ("cat", [0]), ("Cat", [1]), ('"cats, dogs"', [2]), ("cats, dogs", [2]),
    ('"cats, dogs",cat', [2, 0]), ("bird", [3]), ("BIRD", [3]), ("0,3", [0, 3]),
    (" bird , cat ", [3, 0]), ("none,cat", [-1, 0]), ("7", [4]), ("4", [4])])
def test_every_class_can_be_chosen(text, labels):
    assert parse_labels(text, ["cat", "Cat", "cats, dogs", "bird", "7"], 5, len(labels)) == labels


@pytest.mark.mended(20)
@pytest.mark.parametrize("text, says", [
    ("CAT", "'cat' (number 0) or 'Cat' (number 1)"),
    ("dog", "known are cat, Cat, \"cats, dogs\", bird, 0 to 3, and none"),
    ("brid", "did you mean bird?"), ("4", "found '4'"), ("-1", "found '-1'"),
    ("cat,,bird", "found ''"), ("²", "found '²'")])
def test_classes_that_are_none(text, says):
    with pytest.raises(ValueError) as error:
        parse_labels(text, ["cat", "Cat", "cats, dogs", "bird"], 4, 4)
    assert says in str(error.value)


# -- 21: words

@pytest.mark.mended(21)
@pytest.mark.parametrize("encoding", [
    "ascii", "latin-1", "cp1252", "ascii:surrogateescape", "utf-8"])
def test_help_in_any_encoding(encoding):
    for code in (TRAIN, SAMPLE):
        done = python(code, "--help", PYTHONIOENCODING=encoding, PYTHONUTF8="0")
        assert done.returncode == 0, done.stderr
        assert b"unipc, dpmpp_2m" in done.stdout
    done = python(TRAIN, "--help", PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert ("Adam's β1" if encoding == "utf-8" else "Adam's beta1").encode() in done.stdout


@pytest.mark.mended(21)
def test_an_error_in_any_encoding(tmp_path):
    done = python(TRAIN, "--config", "β½ф", PYTHONIOENCODING="ascii")
    assert done.returncode == 2 and b"found 'beta1/2\\u0444'" in done.stderr, done.stderr
    name = os.fsencode(tmp_path) + b"/\xff"  # a file's name that is no text
    done = python(SAMPLE, "--checkpoint", os.fsdecode(name), PYTHONIOENCODING="utf-8")
    assert done.returncode == 2 and name in done.stderr


@pytest.mark.mended(21)
@pytest.mark.parametrize("rank", ["abc", "", "-1", "1.5"])
def test_a_rank_that_is_none(tmp_path, rank):
    done = python(TRAIN, *words(tmp_path/"run"), RANK=rank)
    assert done.returncode == 2 and b"Traceback" not in done.stderr, done.stderr
    assert b"RANK: found '" + rank.encode() in done.stderr


@pytest.mark.mended(21)
def test_every_process_says_its_reason_and_who_it_is(monkeypatch, command):
    "A launcher ends the others as soon as one has ended, perhaps before the main one has spoken."
    monkeypatch.setenv("RANK", "1")
    command.train("--config", "quickstart", "--lerning_rate", "1")
    command.says(2, "diffusion-train (process 1): error: ", "lerning_rate")
    command.sample("--checkpoint", "nowhere")
    command.says(2, "diffusion-sample (process 1): error: ")


@pytest.mark.parametrize("problem, code, says", [
    (KeyboardInterrupt(), 130, "interrupted"), (ValueError("a\nb"), 2, "error: b"),
    (FileNotFoundError("gone"), 2, "error: gone"), (OSError("disk"), 1, "disk (--debug shows"),
    (RuntimeError(), 1, "RuntimeError (--debug shows where)")])
def test_how_a_command_ends(problem, code, says, capsys, command):
    def work(args, words): raise problem
    assert cli._guarded(work, cli.train_parser, []) == code
    assert says in capsys.readouterr().err
    if code != 130:
        with pytest.raises(type(problem)): cli._guarded(work, cli.train_parser, ["--debug"])


def test_help_shows_the_fields_of_the_network_that_is_named(monkeypatch, command):
    from diffusion_model.networks import NETWORKS, Network
    class Toy(BaseModel):
        "A toy."
        name: str = "toy"
        width: int = 4
    monkeypatch.setitem(NETWORKS, "toy", Network(Toy, None))
    for words in ("--model.name=toy", "--model.name toy", "--seed 1 --model-name=toy"):
        command.train(*words.split(), "--help")
        assert command.code == 0 and "--model.width" in command.out
        assert "--model.base_channels" not in command.out
    for words in ([], ["--model.name", "mamba"], ["--model.name"], ["--project", "toy"]):
        command.train(*words, "--help")
        assert command.code == 0 and "--model.base_channels" in command.out


@pytest.mark.mended(16)
def test_nobody_listening_stops_nothing(tmp_path):
    "A warning to a closed pipe (`2> >(head -1)`), a line to one (`| head -1`): the run goes on."
    code = ("import os, sys, warnings\n"
            "read, write = os.pipe(); os.close(read)\n"
            "os.dup2(write, 1); os.dup2(write, 2)\n"
            "from diffusion_model import cli\n"
            "def work(args, words):\n"
            "    for _ in range(3): warnings.warn('something'); cli._say('a line')\n"
            f"    open({str(tmp_path/'done')!r}, 'w').write('done')\n"
            "    return 7\n"
            "sys.exit(cli._guarded(work, cli.train_parser, []))")
    assert python(code).returncode == 7 and (tmp_path/"done").exists()


def test_drawing_loads_no_trainer(trained, tmp_path):
    heavy = ["accelerate", "matplotlib", "torchvision", "diffusion_model.training",
             "diffusion_model.dataset"]
    code = ("import sys; from diffusion_model.cli import sample_command as c; "
            f"code = c(sys.argv[1:]); print([m for m in {heavy} if m in sys.modules]); "
            "sys.exit(code)")
    done = python(code, "--checkpoint", trained, "--output_dir", tmp_path/"out", "--num_samples", 2)
    assert done.returncode == 0 and done.stdout.decode().splitlines()[-1] == "[]", done
