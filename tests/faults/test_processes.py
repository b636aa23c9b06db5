"Faults of runs on two processes: one fails, is killed, is told to stop, or is gone the next time."
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

import pytest

from diffusion_model.checkpoint import find_checkpoint, load_checkpoint
from diffusion_model.tracking import run_lock, read_metrics
from runs import ENVIRONMENT, hashes, steps, told, words

pytestmark = pytest.mark.slow_fault
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

# Each process notes the positions it learned from and where it stopped; the last one has the fault.
WORKER = """
import json, os, signal, sys
from pathlib import Path
import torch
from diffusion_model.checkpoint import list_checkpoints
from runs import resumed, trainer

folder, fault, at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
change = json.loads(sys.argv[4])
rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
run = (resumed if list_checkpoints(folder) else trainer)(folder, **change)
notes, step = {"positions": {}}, run.train_step

def train_step(batch):
    before = run.step
    notes["positions"][before] = batch.positions.tolist()
    if before == at and rank == size - 1:
        if fault == "nan": batch.images[1, 0, 3, 3] = torch.nan
        if fault == "memory": raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        if fault == "signal": os.kill(os.getpid(), signal.SIGTERM)
        if fault == "stop": run.stop = True
    return step(batch)

run.train_step = train_step
try: run.fit()
finally:
    notes["step"] = run.step
    weights = [p.detach().flatten() for p in run.objective.networks["model"].parameters()]
    averages = [p.detach().flatten() for p in run.ema.network.parameters()]
    notes["finite"] = all(p.isfinite().all().item() for p in weights + averages)
    notes["weights"] = torch.cat(weights).double().sum().item()
    (folder.parent/f"notes_{folder.name}_{rank}.json").write_text(json.dumps(notes))
sys.exit(128 + run.stopped_by if run.stopped_by else 0)
"""


def work(folder, processes=2, fault="none", at=-1, **change):
    "A script on so many processes; its exit code, and the notes of each."
    folder.parent.joinpath("worker.py").write_text(WORKER)
    start = [*TORCHRUN, "--nproc_per_node", str(processes)] if processes > 1 else [sys.executable]
    done = subprocess.run([*start, folder.parent/"worker.py", folder, fault, str(at),
                           json.dumps(change)], text=True,
                          env=ENVIRONMENT, cwd=folder.parent, capture_output=True, timeout=100)
    notes = [folder.parent/f"notes_{folder.name}_{rank}.json" for rank in range(processes)]
    return done, [json.loads(n.read_text()) for n in notes if n.exists()]


def launch(*argv, options=()):
    "The command, as a launcher starts it on two processes."
    return subprocess.Popen([*TORCHRUN, "--nproc_per_node", "2", *options, "-m",
                             "diffusion_model.train", *argv],
                            env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def finish(process, seconds=90):
    try: out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as e:
        for rank in (0, 1):
            if pid := find(process, rank): os.kill(pid, signal.SIGKILL)
        process.kill()
        raise AssertionError(f"not at its end after {seconds} s:\n"
                             + "\n".join(process.communicate())) from e
    return out, err


def find(process, rank):
    "The process number of one of a launcher's processes."
    for folder in Path("/proc").glob("[0-9]*"):
        try: mine = (folder/"stat").read_text().rsplit(")", 1)[1].split()[1] == str(process.pid)
        except OSError: continue
        if not mine: continue
        try: names = (folder/"environ").read_text().split("\0")
        except OSError: continue
        if f"RANK={rank}" in names: return int(folder.name)


def wait_for(folder, step, process):
    "Until a run has told of this step."
    until = time.time() + 90
    while time.time() < until and process.poll() is None:
        rows = read_metrics(folder) if (folder/"metrics.jsonl").exists() else []
        if max([r["step"] for r in rows], default=0) >= step: return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached:\n" + "\n".join(finish(process, 1)))


def close(a, b):
    "Weights and averages of two runs within 1e-5."
    a, b = load_checkpoint(a), load_checkpoint(b)
    assert a.step == b.step
    for one, other in ((a.model, b.model), (a.ema, b.ema)):
        assert max((one[k] - other[k]).abs().max().item() for k in one) <= 1e-5
        assert one.keys() == other.keys()


def in_order(notes):
    "All positions of a step, in the order of the processes."
    return {step: [p for note in notes for p in note["positions"][step]]
            for step in notes[0]["positions"]}


# -- the same run, on another number of processes

SAME = {"dropout": 0., "lr_schedule": "constant"}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "Thirty steps of one process: its directory, and which samples stood in each."
    folder = tmp_path_factory.mktemp("one")/"run"
    done, notes = work(folder, 1, max_steps=30, **SAME)
    assert done.returncode == 0, done.stderr
    order = in_order(notes)
    assert list(order) == [str(k) for k in range(30)]
    return folder, order


@pytest.mark.fault(13)
def test_two_processes_learn_what_one_learns(tmp_path, one):
    "With one global batch: the same order of samples, and weights within 1e-5 after thirty steps."
    done, two = work(tmp_path/"run", 2, max_steps=30, **SAME)
    assert done.returncode == 0 and in_order(two) == one[1], done.stderr
    assert two[0]["weights"] == two[1]["weights"]
    close(tmp_path/"run", one[0])


@pytest.mark.fault(13)
def test_two_processes_then_one(tmp_path, one):
    done, begun = work(tmp_path/"run", 2, max_steps=15, **SAME)
    assert done.returncode == 0, done.stderr
    done, ended = work(tmp_path/"run", 1, max_steps=30, **SAME)
    assert done.returncode == 0 and list(ended[0]["positions"])[0] == "15", done.stderr
    assert in_order(begun) | in_order(ended) == one[1]
    close(tmp_path/"run", one[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The undisturbed run of two processes that others are held against."
    folder = tmp_path_factory.mktemp("whole")/"run"
    # of which there is nothing yet
    out, err = finish(run := launch(*words(folder, **PARTS), "--resume"))
    assert run.returncode == 0, out + err
    return folder


PARTS = {"accumulation": 3, "batch_size": 12}


@pytest.mark.fault(2)
def test_two_processes_go_on_inside_an_epoch_with_accumulation(tmp_path, whole):
    "A run of two that was stopped is the run that was not."
    done, notes = work(tmp_path/"run", fault="stop", at=8, **PARTS)
    assert done.returncode == 0 and [n["step"] for n in notes] == [9, 9], done.stderr
    done, _ = work(tmp_path/"run", **PARTS)
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path/"run")[:3] == hashes(whole)[:3] and told(tmp_path/"run") == told(whole)


# -- one of two is killed

@pytest.mark.fault(23)
@pytest.mark.parametrize("rank", [0, 1])
def test_one_is_killed_and_the_run_starts_again_by_itself(tmp_path, whole, rank):
    run = launch(*words(tmp_path/"killed", **PARTS), "--resume", options=["--max-restarts", "1"])
    wait_for(tmp_path/"killed", 12, run)
    os.kill(find(run, rank), signal.SIGKILL)
    out, err = finish(run)
    assert run.returncode == 0, out + err
    resumed_at = int(re.search(r"resumed at step (\d+)", out)[1])
    assert resumed_at >= 10 and resumed_at % 5 == 0
    assert hashes(tmp_path/"killed") == hashes(whole)
    assert told(tmp_path/"killed") == told(whole)


# -- a signal to one of two, and data that does not divide

@pytest.mark.fault(24)
@pytest.mark.fault(4)
def test_a_signal_in_mid_step_to_one_stops_both_at_the_same_step(tmp_path):
    done, notes = work(tmp_path/"run", fault="signal", at=16, train_size=91)
    assert [n["step"] for n in notes] == [17, 17], done.stderr
    assert done.returncode != 0 and done.stderr.count("exitcode  : 143") >= 1, done.stderr
    assert find_checkpoint(tmp_path/"run").name == "step_00000017"
    assert notes[0]["weights"] == notes[1]["weights"]
    done, notes = work(tmp_path/"run", train_size=91)
    assert done.returncode == 0 and [n["step"] for n in notes] == [40, 40], done.stderr


@pytest.mark.fault(24)
def test_data_that_two_cannot_share_equally(tmp_path):
    "Ninety-one images: in each epoch each comes once, and both processes make the same steps."
    done, notes = work(tmp_path/"run", train_size=91, max_steps=31)
    assert done.returncode == 0 and [n["step"] for n in notes] == [31, 31], done.stderr
    order = in_order(notes)
    assert [p for step in order.values() for p in step] == list(range(31*6))


@pytest.mark.fault(24)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_from_outside_to_one_of_two(tmp_path, rank):
    "It never hangs: the launcher is at its end within thirty seconds."
    run = launch(*words(tmp_path/"run", max_steps=100_000, train_size=91, sample_every=1_000_000))
    wait_for(tmp_path/"run", 7, run)
    os.kill(find(run, rank), signal.SIGTERM)
    out, err = finish(run, 30)
    assert run.returncode != 0 and "exitcode  : 143" in err, out + err
    step = int(re.search(r"stopped at step (\d+), and saved", out)[1])
    assert steps(tmp_path/"run")[-1] == step == read_metrics(tmp_path/"run")[-1]["step"]
    load_checkpoint(tmp_path/"run")


@pytest.mark.fault(4)
def test_a_signal_to_the_launcher(tmp_path):
    "It passes SIGTERM on to both, which finish their step and save."
    run = launch(*words(tmp_path/"run", max_steps=100_000, sample_every=1_000_000))
    wait_for(tmp_path/"run", 7, run)
    run.send_signal(signal.SIGTERM)
    out, err = finish(run, 60)
    assert run.returncode != 0, out + err
    step = int(re.search(r"stopped at step (\d+), and saved", out)[1])
    assert steps(tmp_path/"run")[-1] == step == read_metrics(tmp_path/"run")[-1]["step"]


# -- an error of one of two

@pytest.mark.fault(17)
def test_a_pixel_that_is_no_number_on_one_of_two_stops_both(tmp_path):
    "Step 12, whose samples 72 to 77 are shared: the second of the last process is position 76."
    done, notes = work(tmp_path/"run", fault="nan", at=12)
    assert done.returncode != 0
    assert [(n["step"], n["finite"]) for n in notes] == [(12, True)]*2
    assert notes[0]["weights"] == notes[1]["weights"]
    for part in ("FloatingPointError: step 12", "gradient norm nan", "samples 76 (image ",
                 "learning rate 0.00"):
        assert part in done.stderr, done.stderr
    there = load_checkpoint(tmp_path/"run")
    assert there.step == 10
    assert all(t.isfinite().all() for part in (there.model, there.ema) for t in part.values())


@pytest.mark.fault(18)
def test_no_memory_on_one_of_two_stops_both(tmp_path):
    done, notes = work(tmp_path/"run", fault="memory", at=12)
    assert done.returncode != 0 and [n["step"] for n in notes] == [12]*len(notes)
    for part in ("step 12: no memory left on cpu", "--accumulation 2"):
        assert part in done.stderr, done.stderr
    assert load_checkpoint(tmp_path/"run").step == 10


@pytest.mark.fault(25)
def test_two_processes_in_a_directory_in_use(tmp_path):
    "All end, none waits for another; one of them says why."
    with run_lock(tmp_path/"run", 40):
        run = launch(*words(tmp_path/"run"))
        out, err = finish(run, 60)
    assert run.returncode != 0
    assert err.count(f"run directory '{tmp_path/'run'}' is in use by process") == 1, err
    assert not (tmp_path/"run"/"checkpoints").exists()
