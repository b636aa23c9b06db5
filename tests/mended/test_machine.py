"Mended faults of the machine: optimizer, averages, checkpoints, trackers, processes."
import errno, json, os, shutil, subprocess, sys, warnings
from pathlib import Path

import pytest
import torch
from devices import apple
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import diffusion_model.checkpoint as checkpoint
import diffusion_model.tracking as tracking
from diffusion_model.checkpoint import (CheckpointError, find_checkpoint, load_checkpoint,
                                        save_checkpoint)
from diffusion_model.ema import EMA
from diffusion_model.processes import World, report_lost_process
from diffusion_model.tracking import (MetricsFile, Trackers, read_metrics, read_status,
                                      record_start, run_lock, warn_safely)
from test_checkpoint import Run, reseal, saver

ROOT = Path(__file__).resolve().parent.parent.parent


pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@pytest.fixture
def run(tmp_path): return Run(tmp_path)


@pytest.fixture
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"): monkeypatch.delenv(name, raising=False)
    return monkeypatch


# -- 2: what an interrupted first save leaves

@pytest.mark.mended(2)
def test_what_an_interrupted_first_save_left_is_no_checkpoint_and_is_named(run):
    (run.root/"checkpoints"/"step_00000005.tmp").mkdir(parents=True)
    (run.root/"checkpoints"/"step_00000005.tmp"/"manifest.json").write_text("{}")
    for path in (run.root, run.root/"checkpoints"):
        with pytest.raises(FileNotFoundError, match="none but step_00000005.tmp, which an inter"):
            find_checkpoint(path)
    run.save(5)
    assert run.names() == ["step_00000005"] and load_checkpoint(run.root).step == 5


# -- 3: parameters that are not trained

@pytest.mark.mended(3)
def test_an_average_of_what_does_not_move_is_the_thing_itself():
    "Frozen weights to the last bit, and whole numbers, which cannot be averaged, as they are."
    net = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3))
    net.order = nn.Parameter(torch.arange(3), requires_grad=False)
    ema = EMA(net, 0.9)
    with torch.no_grad():
        net.order.add_(7)
        net[1].weight.add_(1.)
    before = ema.network[1].weight.clone()
    for step in range(30): ema.update(step)
    assert torch.equal(ema.network[0].weight, net[0].weight)
    assert ema.network.order.tolist() == [7, 8, 9]
    assert (ema.network[1].weight > before).all()


# -- 15: checks that passed when the code was wrong

@pytest.mark.mended(15)
def test_buffers_are_lent_with_the_weights():
    "The trained network's statistics have gone on; what is lent comes with the averaged ones."
    net = nn.BatchNorm1d(2)
    ema = EMA(net)
    net(torch.randn(8, 2) + 5)
    trained = {k: v.clone() for k, v in net.state_dict().items()}
    assert not torch.equal(trained["running_mean"], ema.network.running_mean)
    with ema.swapped():
        assert net.running_mean.tolist() == [0., 0.] and net.num_batches_tracked == 0
    for k, v in net.state_dict().items(): assert torch.equal(v, trained[k])
    assert ema.network.running_mean.tolist() == [0., 0.]


PAIR = """
import json, sys
from pathlib import Path
import torch
from accelerate import debug_launcher
from diffusion_model.processes import World

def work(folder):
    world = World("cpu")
    rank = world.rank
    found = {"reduce": world.reduce(sums=[3 + rank, torch.tensor(0.5)],
                                    maxima=[-1 - rank, 10*rank]),
             "sum": world.sum(3 + rank, 10), "max": world.max(3 + rank, -rank),
             "nan": world.max(float("nan") if rank else 1.),
             "gather": world.gather([rank]*(rank + 1))}
    try: world.agree(seed=rank, data={"images": 60_000, "digest": "abc"}, steps=10)
    except ValueError as error: found["differ"] = str(error)
    world.agree(seed=0, data={"images": 60_000})
    Path(folder, str(rank)).write_text(json.dumps(found))

debug_launcher(work, (sys.argv[1],), num_processes=2)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "What two processes have found."
    folder = tmp_path_factory.mktemp("pair")
    done = subprocess.run([sys.executable, "-c", PAIR, str(folder)], text=True, capture_output=True,
                          timeout=90,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return [json.loads((folder/str(rank)).read_text()) for rank in (0, 1)]


@pytest.mark.mended(15)
def test_sums_and_maxima_of_two_processes_differ(pair):
    assert pair[0] == pair[1]
    assert pair[0]["reduce"] == [[7, 1], [-1, 10]]
    assert pair[0]["sum"] == [7, 20] and pair[0]["max"] == [4, 0]
    assert str(pair[0]["nan"]) == "[nan]"
    assert pair[0]["gather"] == [0, 1, 1]


# -- 16: nothing that only watches may end a run

WATCHED = """
import sys, warnings
from pathlib import Path
from diffusion_model.tracking import (ProgressBar, ProgressLines, Tracker, Trackers, record_start,
                                      run_lock)

def complain(message, *_): print("warning:", message, file=sys.stderr)      # as the commands do
warnings.showwarning = complain

class Broken(Tracker):
    def log(self, step, values): raise OSError("disk full")

kinds = {"bar": lambda: ProgressBar(300), "lines": lambda: ProgressLines(300, every=0.),
         "none": Tracker}
folder = Path(sys.argv[1])
(folder/"status.json.tmp").mkdir(parents=True)      # so that no status can be written
(folder/"starts.jsonl").mkdir()
with run_lock(folder, 300) as write_status:
    record_start(folder, 0)
    trackers = Trackers({"broken": Broken, "console": kinds[sys.argv[2]]})
    for step in range(1, 301):
        write_status("running", step)
        trackers.log(step, {"loss": 1/step})
    assert list(trackers.active) == ["console"]
    trackers.close()
print("finished")
"""


@pytest.mark.mended(16)
@pytest.mark.parametrize("console", ["bar", "lines", "none"])
@pytest.mark.parametrize("broken", ["pipe", "full"])
def test_a_broken_standard_error_does_not_end_a_run(tmp_path, console, broken):
    "Neither the bar, nor a warning, nor what Python flushes at the end: exit code 0, all steps."
    if broken == "pipe": read, write = os.pipe()
    else: write = os.open("/dev/full", os.O_WRONLY)
    process = subprocess.Popen([sys.executable, "-c", WATCHED, str(tmp_path/"run"), console],
                               stderr=write, stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    os.close(write)
    if broken == "pipe": os.close(read)  # as `head -1` does, once it has its line
    assert process.communicate(timeout=60)[0].split() == ["finished"]
    assert process.returncode == 0


@pytest.mark.mended(16)
def test_a_warning_that_fails_is_no_failure(monkeypatch):
    def fail(*_, **__): raise UnicodeEncodeError("ascii", "β", 0, 1, "ordinal not in range")
    monkeypatch.setattr(warnings, "showwarning", fail)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", fail)
        warn_safely("β is far too large")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="asked for"): warn_safely("this was asked for")


@pytest.mark.mended(16)
@pytest.mark.parametrize("when", ["at the start", "later"])
def test_metrics_that_cannot_be_written_are_a_warning(tmp_path, when):
    path, shown = tmp_path/"metrics.jsonl", []
    if when == "at the start": path.mkdir()
    class Other(tracking.Tracker):
        def log(self, step, values): shown.append(step)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trackers = Trackers({"metrics.jsonl": lambda: MetricsFile(path), "other": Other})
        if when == "later":
            trackers.log(1, {"loss": 1.})
            trackers.active["metrics.jsonl"].file.close()
            trackers.active["metrics.jsonl"].file = open("/dev/full", "a")
        for step in (2, 3): trackers.log(step, {"loss": 1.})
        trackers.close()
    assert [str(w.message).split(" failed")[0] for w in caught] == ["tracker metrics.jsonl"]
    assert shown[-2:] == [2, 3]
    if when == "later": assert [row["step"] for row in read_metrics(path)] == [1]


# -- 17: the disk and the directory

def full(*_, **__): raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.mended(17)
def test_a_status_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch):
    with run_lock(tmp_path, 10) as write_status:
        write_status("running", 1)
        with monkeypatch.context() as broken, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            broken.setattr(tracking.os, "replace", full)
            for step in (2, 3): write_status("running", step)
        assert [str(w.message) for w in caught] == [
            f"{tmp_path/'status.json'} cannot be kept up to date: No space left on device; "
            "training goes on"]
        assert read_status(tmp_path)["step"] == 1
        write_status("running", 4)
    assert read_status(tmp_path)["step"] == 4


@pytest.mark.mended(17)
def test_the_reason_of_a_failure_survives_a_status_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(FloatingPointError, match="NaN"), pytest.warns(UserWarning,
                                                                      match="status.json"):
        with run_lock(tmp_path, 10):
            monkeypatch.setattr(tracking.os, "replace", full)
            raise FloatingPointError("NaN")
    monkeypatch.undo()
    with run_lock(tmp_path, 10): pass                       # the lock was given back


@pytest.mark.mended(17)
@pytest.mark.parametrize("kind", ["a file", "inside a file", "no room"])
def test_a_run_directory_that_cannot_be_used_says_what_to_do(tmp_path, monkeypatch, kind):
    folder = tmp_path/"run"
    if kind == "no room": monkeypatch.setattr(tracking.Path, "mkdir", full)
    else:
        folder.write_text("x")
        if kind == "inside a file": folder = folder/"deeper"
    with pytest.raises(OSError,
                       match=rf"run directory '{folder}' cannot be used: .*--output_dir") as caught:
        with run_lock(folder, 10): pass
    assert not str(caught.value).startswith("[Errno")


@pytest.mark.mended(17)
def test_a_start_that_cannot_be_noted_is_a_warning(tmp_path):
    (tmp_path/"starts.jsonl").mkdir()
    with pytest.warns(UserWarning, match="starts.jsonl cannot be written"):
        row = record_start(tmp_path, 7)
    assert row["step"] == 7


@pytest.mark.mended(17)
@pytest.mark.parametrize("where", ["mkdir", "_pages"])
def test_a_disk_without_inodes_gives_the_promised_message(run, monkeypatch, where):
    "There is room in bytes, and yet no file can be made."
    run.save(1)
    if where == "mkdir": monkeypatch.setattr(checkpoint.Path, "mkdir", full)
    else: monkeypatch.setattr(checkpoint, "_pages", full)
    with pytest.raises(OSError,
                       match=r"could not save step 2.*No space left.*inodes.*last good: step 1"):
        run.save(2)
    monkeypatch.undo()
    assert run.names() == ["step_00000001"] and run.save(3)


@pytest.mark.mended(17)
def test_a_failure_that_nobody_asked_for_is_one_line_at_the_end(tmp_path):
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT/'tests')!r}]
import diffusion_model.checkpoint as module
from test_checkpoint import Run
def full(path): raise OSError(28, "No space left on device")
run = Run({str(tmp_path)!r})
module._sha256 = full
run.save(1, wait=False)
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "atexit" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert "step_00000001 was written, but is not safe from a power cut" in last


@pytest.mark.mended(17)
@pytest.mark.parametrize("best", [False, True])
def test_a_checkpoint_that_is_pruned_while_it_is_checked(run, monkeypatch, best):
    "Its run goes on, saves the next and deletes this one: the reader gets that one, unwarned."
    run.save(1, score=0.5)
    real, calls = checkpoint._check_file, []
    def check(path, *rest):
        calls.append(path)
        if len(calls) == 3:
            monkeypatch.setattr(checkpoint, "_check_file", real)
            run.save(2, score=0.4, keep=1)
        return real(path, *rest)
    monkeypatch.setattr(checkpoint, "_check_file", check)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(run.root, best=best).step == 2
    assert run.names() == ["step_00000002"]


@pytest.mark.mended(17)
@pytest.mark.parametrize("part", ["model", "trainer", "config"])
def test_a_checkpoint_that_is_pruned_while_it_is_read(run, monkeypatch, part):
    run.save(1)
    name = {"model": "_read_weights", "trainer": "_read_trainer", "config": "_read_config"}[part]
    real = getattr(checkpoint, name)
    def read(*args):
        monkeypatch.setattr(checkpoint, name, real)
        run.save(2, keep=1)
        return real(*args)
    monkeypatch.setattr(checkpoint, name, read)
    assert load_checkpoint(run.root, read=("model", "trainer", "config")).step == 2


@pytest.mark.mended(17)
def test_what_was_read_stays_and_what_was_not_says_why_it_is_gone(run):
    path = run.save(1)
    found = load_checkpoint(run.root, read=("ema", "config"))
    shutil.rmtree(path)
    assert found.ema is not None and found.config == run.config
    for part in ("model", "trainer"):
        with pytest.raises(CheckpointError,
                           match="step_00000001 was deleted while it was read.*open the run again"):
            getattr(found, part)


@pytest.mark.mended(17)
def test_a_step_that_was_asked_for_is_not_exchanged_for_another(run, monkeypatch):
    path = run.save(1)
    real = checkpoint._read_weights
    def read(*args):
        run.save(2, keep=1)
        return real(*args)
    monkeypatch.setattr(checkpoint, "_read_weights", read)
    with pytest.raises(CheckpointError, match="was deleted while it was read"):
        load_checkpoint(path, read=["model"])


@pytest.mark.mended(17)
def test_reading_from_a_run_that_saves_as_fast_as_it_can(tmp_path):
    process = saver(tmp_path, "never")
    process.stdout.readline()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = ("model", "ema", "trainer", "config")
        steps = [load_checkpoint(tmp_path/"never"/"run", read=parts).step for _ in range(40)]
    process.kill()
    process.wait()
    assert steps == sorted(steps) and steps[-1] > steps[0]


@pytest.mark.mended(17)
@pytest.mark.parametrize("name", ["manifest.json", "ema.safetensors"])
def test_a_newest_checkpoint_that_may_not_be_read(run, monkeypatch, name):
    "The run: the one before, with a warning. The step itself: an error. Pruning leaves it alone."
    for step in (1, 2): run.save(step)
    locked = run.root/"checkpoints"/"step_00000002"/name
    def forbid(real):
        def guarded(path, *rest):
            if path == locked: raise PermissionError(errno.EACCES, "Permission denied", str(locked))
            return real(path, *rest)
        return guarded
    monkeypatch.setattr(checkpoint, "_unseal", forbid(checkpoint._unseal))
    monkeypatch.setattr(checkpoint, "_check_file", forbid(checkpoint._check_file))
    said = f"{name} cannot be read: Permission denied; falling back to step_00000001"
    with pytest.warns(UserWarning, match=said):
        assert load_checkpoint(run.root).step == 1
    with pytest.raises(CheckpointError, match=f"{name} cannot be read: Permission denied"):
        load_checkpoint(locked.parent)
    run.save(3, keep=1)
    assert run.names() == ["step_00000002", "step_00000003"]


# -- 18 and 21: words

@pytest.mark.mended(18)
def test_resuming_from_a_released_model_is_refused_in_our_words(run):
    path = save_checkpoint(run.root, 1, run.network, run.ema, None, run.config)
    with pytest.raises(CheckpointError,
                       match="holds weights alone, and no trainer.pt to resume from"):
        load_checkpoint(path, read=["trainer"])


class Stranger:
    def __reduce__(self): return os.mkdir, ("was_here",)


@pytest.mark.mended(21)
def test_a_forged_file_is_refused_without_advice_to_trust_it(run):
    path = run.save(1)
    torch.save({"optimizer": Stranger()}, path/"trainer.pt")
    files = json.loads((path/"manifest.json").read_text())["files"]
    files["trainer.pt"] = {"bytes": (path/"trainer.pt").stat().st_size,
                           "sha256": checkpoint._sha256(path/"trainer.pt")}
    reseal(path, files=files)
    said = "trainer.pt is refused.*asks for posix.mkdir.*another checkpoint"
    with pytest.raises(CheckpointError, match=said) as caught:
        load_checkpoint(path).trainer
    text = str(caught.value)
    for advice in ("weights_only", "add_safe_globals", "trust", "arbitrary code"):
        assert advice not in text, text
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.mended(21)
@pytest.mark.parametrize("environment, says", [
    ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: found 'abc' in the environment"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE: found '0'"),
    ({"WORLD_SIZE": "-2"}, "WORLD_SIZE: found '-2'"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE: found ''"), ({"RANK": "abc"}, "RANK: found 'abc'"),
    ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"},
     "RANK: found '2'.*whole number from 0 to 1"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2.*but LOCAL_RANK not set"),
    ({"WORLD_SIZE": "2"}, "but RANK and LOCAL_RANK not set")])
def test_what_a_launcher_left_behind_is_named(no_launcher, environment, says):
    for name, value in environment.items(): no_launcher.setenv(name, value)
    with pytest.raises(ValueError, match=f"{says}.*launcher"): World("cpu")


@pytest.mark.mended(21)
def test_processes_of_different_runs_say_so_on_each_of_them(pair):
    for found in pair: assert found["differ"].splitlines() == [
        "the processes do not belong to one run: give each the same command, code and data",
        "seed: 0 in process 0; 1 in process 1"]


class Several(World):
    "Stands for a world of more processes, of which this one has been given what the others say."
    def __init__(self, *others): self.size, self.rank, self.others = len(others) + 1, 0, others
    def gather(self, values): return values + list(self.others)


@pytest.mark.mended(21)
def test_what_differs_is_named_leaf_by_leaf_and_long_values_by_their_hash():
    from diffusion_model.processes import _leaves
    one = {"config": {"training": {"seed": 1, "lr": 0.1}}, "names": ["x"*100], "images": 10}
    two = {"config": {"training": {"seed": 2, "lr": 0.1}}, "names": ["x"*99 + "y"], "images": 10,
           "more": None}
    with pytest.raises(ValueError) as caught: Several(_leaves(two), _leaves(one)).agree(**one)
    lines = str(caught.value).splitlines()[1:]
    assert lines[0] == "config.training.seed: 1 in process 0, 2; 2 in process 1"
    assert lines[1].startswith('names: ["xxx') and len(lines[1]) < 200
    assert lines[1].count("… (hash ") == 2
    assert lines[2] == "more: nothing in process 0, 2; null in process 1" and len(lines) == 3
    Several(_leaves(one)).agree(**one)


@pytest.mark.mended(21)
@pytest.mark.parametrize("message",
                         ["run directory 'outputs/gloo/run' is in use", "gloo is not what failed"])
def test_an_error_of_ones_own_is_not_taken_for_a_lost_process(message):
    with pytest.raises(RuntimeError, match=message), report_lost_process(Several({})):
        raise RuntimeError(message)


@pytest.mark.mended(21)
@pytest.mark.parametrize("error", [
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed"),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting"),
    torch.distributed.DistBackendError("NCCL error")])
def test_a_broken_connection_is_put_into_words(error):
    with pytest.raises(ConnectionError, match="process 0 of 2 stops, because another one did"):
        with report_lost_process(Several({})): raise error


# -- Apple's GPUs

@pytest.mark.mended(5)
def test_numbers_on_an_apple_gpu_are_not_asked_for_in_double_precision():
    world = World("cpu")
    with apple():
        world.device = torch.device("mps")
        loss = torch.tensor(0.5).to("mps")
        assert world.reduce(sums=[loss, 2], maxima=[1]) == ([0.5, 2], [1])


@pytest.mark.mended(11)
def test_several_numbers_are_fetched_from_the_device_at_once(no_launcher):
    waits = []
    for name in ("item", "tolist", "__float__"):
        real = getattr(torch.Tensor, name)
        def waiting(tensor, real=real, name=name): return (waits.append(name), real(tensor))[1]
        no_launcher.setattr(torch.Tensor, name, waiting)
    assert World("cpu").reduce([torch.tensor(2.), torch.tensor([3.])],
                               [torch.tensor(4), 5]) == ([2, 3], [4, 5])
    assert len(waits) == 1
