"Faults 5 to 10, 12, 22, 25 to 27: a whole run and a full disk, damage, malice, others' files."
import hashlib, io, json, os, pickle, re, shutil, subprocess, sys, tempfile, zipfile

import pytest
import torch

import diffusion_model.checkpoint as module
from diffusion_model.checkpoint import CheckpointError, find_checkpoint
from diffusion_model.tracking import run_lock, read_metrics, read_status
from runs import ENVIRONMENT, At, hashes, python, resumed, steps, stop, trainer, words


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    "A run with checkpoints at 5 and 10 of 20 steps."
    folder = tmp_path_factory.mktemp("ten")/"run"
    trainer(folder, At(10, stop), max_steps=20).fit()
    return folder


@pytest.fixture
def run(ten, tmp_path): return shutil.copytree(ten, tmp_path/"run")


def newest(run): return run/"checkpoints"/"step_00000010"


def reseal(path, **changes):
    "The manifest, changed by somebody who knows how it is sealed."
    manifest = json.loads((path/"manifest.json").read_text())
    manifest.pop("sha256")
    for name in manifest["files"]:
        data = (path/name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path/"manifest.json").write_bytes(module._seal(manifest | changes))


# -- no room

LIMITED = """
import resource, sys
from diffusion_model.cli import train_command
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(train_command(sys.argv[1:]))
"""


@pytest.mark.fault(5)
def test_a_disk_that_is_full_says_how_much_it_needs_and_keeps_the_last(run):
    size = sum(f.stat().st_size for f in newest(run).iterdir())
    assert size > 20_000
    done = python(run.parent, LIMITED, "--resume", run)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for part in ("could not save step 15", "MB free at", str(run), "last good: step 10",
                 "logging.keep_checkpoints", "logging.output_dir"):
        assert part in done.stderr, done.stderr
    needed = float(re.search(r"it needs ([\d.]+) MB", done.stderr)[1])
    assert abs(needed - size/1e6) <= 0.1  # one digit is told
    assert steps(run) == [5, 10]
    assert read_status(run)["state"] == "failed"
    assert resumed(run, max_steps=20).fit().step == 20


@pytest.mark.fault(6)
def test_no_place_for_temporary_files(run, monkeypatch, ten):
    def refuse(*_, **__): raise FileNotFoundError("no temporary folder")
    monkeypatch.setenv("TMPDIR", "/nowhere/at/all")
    for name in ("gettempdir", "mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryFile"):
        monkeypatch.setattr(tempfile, name, refuse)
    resumed(run, max_steps=20).fit()
    assert find_checkpoint(run).name == "step_00000020"


@pytest.mark.fault(7)
def test_the_only_checkpoint_survives_a_save_that_fails(tmp_path, monkeypatch):
    trainer(tmp_path, At(5, stop), keep_checkpoints=1).fit()
    before = hashes(tmp_path)
    def fail(*_, **__): raise OSError("the writer broke")
    monkeypatch.setattr(module, "save_config", fail)
    with pytest.raises(OSError, match="the writer broke"):
        resumed(tmp_path, keep_checkpoints=1).fit()
    assert steps(tmp_path) == [5] and hashes(tmp_path) == before
    monkeypatch.undo()
    resumed(tmp_path, At(12, stop), keep_checkpoints=1).fit()
    assert steps(tmp_path) == [12]


# -- damage

def damage(path, kind):
    size = path.stat().st_size
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    if kind == "one bit": path.write_bytes(data)
    else: os.truncate(path, 0 if kind == "empty" else size//2)


KINDS = [pytest.param(k, marks=pytest.mark.fault(9 if k == "one bit" else 8))
         for k in ("truncated", "empty", "one bit")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_newest_checkpoint(run, command, kind):
    "The run goes back to the one before, with a warning; asked for by its path, it is an error."
    file = newest(run)/"model.safetensors"
    whole = shutil.copytree(run, run.parent/"whole")
    assert command.train("--resume", whole).code == 0
    damage(file, kind)
    size = f"{file.stat().st_size:,} "
    command.train("--resume", newest(run))
    command.says(2, file, size, "sha256" if kind == "one bit" else "cut short")
    assert steps(run) == [5, 10]
    command.train("--resume", run)
    command.says(0, "warning", file, size, "falling back to step_00000005")
    assert "resumed at step 5" in command.out
    assert hashes(run) == hashes(whole)


@pytest.mark.fault(8)
def test_no_valid_checkpoint_is_left(run, command):
    for step in (5, 10): os.truncate(run/"checkpoints"/f"step_{step:08d}"/"manifest.json", 0)
    command.train("--resume", run)
    command.says(2, "no valid checkpoint", "step_00000005", "step_00000010", "(0 bytes)")


# -- malice

class Stranger:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)


@pytest.mark.fault(10)
@pytest.mark.parametrize("write, read", [
    (torch.save,
     lambda path: torch.load(io.BytesIO(path.read_bytes()), weights_only=False)),
    (lambda x, path: torch.save(x, path, _use_new_zipfile_serialization=False),
     lambda path: torch.load(io.BytesIO(path.read_bytes()), weights_only=False)),
    (lambda x, path: path.write_bytes(pickle.dumps(x)),
     lambda path: pickle.loads(path.read_bytes()))],
    ids=["zip", "legacy", "pickle"])
@pytest.mark.parametrize("name", ["trainer.pt", "model.safetensors"])
def test_a_file_that_would_run_code(run, command, write, read, name):
    mark = run.parent/"was_here"
    write({"optimizer": Stranger(str(mark))}, newest(run)/name)
    reseal(newest(run))
    command.train("--resume", run)
    command.says(2, newest(run)/name, "refused" if name == "trainer.pt"
                 else "not a safetensors file")
    assert not mark.exists()
    read(newest(run)/name)
    assert mark.exists()  # a careless reader would have run it


# -- files that are not what they should be

@pytest.mark.fault(12)
def test_optimizer_state_is_not_weights(run, command):
    command.sample("--checkpoint", newest(run)/"trainer.pt")
    command.says(2, newest(run)/"trainer.pt", "is optimizer state, not weights",
                 f"pass the checkpoint's folder, {newest(run)}")


@pytest.mark.fault(12)
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_weights_of_a_wrapped_network_train_on(run, prefix, ten):
    from safetensors.torch import load_file, save_file
    for name in ("model.safetensors", "ema.safetensors"):
        file = newest(run)/name
        save_file({prefix + k: v for k, v in load_file(file).items()}, file)
    reseal(newest(run))
    again, plain = resumed(run), resumed(ten)
    for a, b in zip(again.objective.averaged.state_dict().values(),
                    plain.objective.averaged.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(again.ema.network.state_dict().values(),
                    plain.ema.network.state_dict().values(), strict=True):
        assert torch.equal(a, b)


# -- names that lead elsewhere. A run has no name but its directory, which the user chooses, so that
# /etc/x is his own wish; what comes from others are a manifest and its class names. No archive is
# unpacked here: torch reads trainer.pt
# from within, and torchvision unpacks its own downloads, held to their checksums.

def everything(folder): return {p.relative_to(folder) for p in folder.rglob("*")}


@pytest.mark.fault(22)
@pytest.mark.parametrize("name", ["../../x", "/etc/x", "..", ".", "a/b", "a\\..\\b", "", "\n"])
def test_class_names_of_a_stranger_stay_in_the_output_directory(tmp_path, command, name):
    home = tmp_path/"deep"/"home"
    trainer(home/"run", At(1, stop), num_classes=8).fit()
    checkpoint = find_checkpoint(home/"run")
    reseal(checkpoint, classes=[name]*8)
    before = everything(tmp_path)
    command.sample("--checkpoint", checkpoint, "--output_dir", home/"out")
    assert command.code == 0, command.err
    new = everything(tmp_path) - before
    assert len(new) == 6 and all(p.parts[:3] == ("deep", "home", "out") for p in new)


@pytest.mark.fault(22)
def test_a_label_is_a_name_or_a_number_and_no_path(run, command):
    command.sample("--checkpoint", run, "--labels", "../../x", "--output_dir", run/"out")
    command.says(2, "--labels: found '../../x'", "known are disc", "0 to 7")
    assert not (run/"out").exists()


@pytest.mark.fault(22)
def test_a_manifest_that_lists_files_elsewhere(run, command):
    secret = run.parent/"secret"
    secret.write_text("x")
    for name in ("../../../secret", str(secret)):
        files = json.loads((newest(run)/"manifest.json").read_text())["files"]
        reseal(newest(run),
               files=files | {name: {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}})
        command.train("--resume", newest(run))
        command.says(2, newest(run)/"manifest.json", name)
        shutil.copytree(newest(run).with_name("step_00000005"), newest(run), dirs_exist_ok=True)


@pytest.mark.fault(22)
def test_an_archive_with_a_way_out(run):
    "`trainer.pt` is a zip file: with an entry named ../e it is refused, and nothing is written."
    file = newest(run)/"trainer.pt"
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("../e", "gone")
    reseal(newest(run))
    before = everything(run.parent)
    with pytest.raises(CheckpointError, match="trainer.pt is refused"): resumed(run)
    assert everything(run.parent) == before


# -- two runs

@pytest.mark.fault(25)
def test_a_directory_in_use_is_refused_with_and_without_resume(run, command):
    with run_lock(run, 40) as tell:
        tell("running", 10)
        command.train("--resume", run, "--max_steps", "12")
        command.says(1, f"run directory '{run}' is in use by process {os.getpid()}", "at step 10",
                     "--output_dir")
        assert steps(run) == [5, 10]
    command.train(*words(run))
    command.says(2, f"logging.output_dir: '{run}' already holds a run", "--resume", "another place")
    command.train("--resume", run, "--max_steps", "12")
    command.says(0)
    with run_lock(run.parent/"new", 40):
        command.train(*words(run.parent/"new"))
        command.says(1, f"run directory '{run.parent/'new'}' is in use by process")


@pytest.mark.fault(25)
@pytest.mark.slow_fault
def test_two_started_at_once(tmp_path):
    "One has it, the other is told so; the first is not disturbed."
    code = ("import sys; "
            "from diffusion_model.cli import train_command as c; sys.exit(c(sys.argv[1:]))")
    start = lambda: subprocess.Popen([sys.executable, "-c", code,
                                      *words(tmp_path/"run", max_steps=40)], env=ENVIRONMENT,
                                     text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    done = [(p, *p.communicate(timeout=120)) for p in [start(), start()]]
    (lost, _, complaint), (won, _, quiet) = sorted(done, key=lambda d: -d[0].returncode)
    assert won.returncode == 0 and lost.returncode in (1, 2), complaint + quiet
    assert "is in use by process" in complaint or "already holds a run" in complaint, complaint
    assert steps(tmp_path/"run")[-1] == 40
    assert [row["step"] for row in read_metrics(tmp_path/"run")
            if "loss" in row] == list(range(1, 41))


# -- devices and trackers

@pytest.mark.fault(26)
def test_a_run_from_a_gpu_goes_on_without_one(run, monkeypatch, ten):
    state = torch.load(newest(run)/"trainer.pt", weights_only=True)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
    torch.save(state, newest(run)/"trainer.pt")
    monkeypatch.undo()
    assert b"cuda:0" in (newest(run)/"trainer.pt").read_bytes()
    reseal(newest(run))
    assert resumed(run, max_steps=20).fit().step == 20
    again = resumed(shutil.copytree(ten, run.parent/"plain"), max_steps=20).fit()
    assert hashes(again.run_dir) == hashes(run)


@pytest.mark.fault(27)
def test_trackers_that_fail_do_not_stop_a_run(tmp_path, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tmp_path.joinpath("run").mkdir()
    # root may write into a read-only directory
    (tmp_path/"run"/"tensorboard").write_text("in the way")
    command.train(*words(tmp_path/"run", trackers="tensorboard,wandb", max_steps=3))
    command.says(0, "tracker tensorboard failed", "tracker wandb failed", "training goes on",
                 "pip install 'diffusion_model[wandb]'")
    assert [row["step"] for row in read_metrics(tmp_path/"run") if "loss" in row] == [1, 2, 3]


@pytest.mark.fault(27)
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only directory")
def test_a_read_only_tensorboard_directory(tmp_path, command):
    (tmp_path/"tensorboard").mkdir(mode=0o500)
    command.train(*words(tmp_path, trackers="tensorboard", max_steps=3))
    command.says(0, "tracker tensorboard failed", "Permission denied")
