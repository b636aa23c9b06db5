"Faults 1 to 4 and 11: runs that stop, and go on."
import json, os, random, signal

import numpy as np
import pytest
import torch

import diffusion_model.training as training
from diffusion_model.checkpoint import find_checkpoint
from runs import At, Callback, hashes, python, resumed, steps, stop, told, trainer, words

PARTS = {"accumulation": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Forty steps at one go: accumulation, dropout, flips, averages, a warm-up and a cosine."
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder, **PARTS).fit()
    t = run.cfg.training
    assert (t.accumulation, t.lr_schedule, run.cfg.model.dropout,
            run.cfg.data.horizontal_flip) == (3, "cosine", 0.1, True)
    assert t.ema_decay and hashes(folder)[0] == "step_00000040"
    return folder


def disturb():
    "Leave the generators elsewhere than a run would."
    torch.manual_seed(1234), np.random.seed(5), random.seed(6)
    torch.rand(random.randrange(9))


def same(a, b):
    assert hashes(a) == hashes(b)
    assert told(a) == told(b) and len(told(a)) == 40


# -- resume

@pytest.mark.fault(1)
@pytest.mark.parametrize("workers", [0, 2])
def test_forty_are_seventeen_and_twenty_three(whole, tmp_path, workers):
    cut = trainer(tmp_path, At(17, stop), num_workers=workers, **PARTS).fit()
    assert cut.step == 17 and 17*6 % len(cut.datasets.train)  # in mid-epoch
    disturb()
    assert resumed(tmp_path, num_workers=workers, **PARTS).fit().step == 40
    same(tmp_path, whole)


@pytest.mark.fault(2)
def test_from_step_zero(whole, tmp_path):
    trainer(tmp_path, **PARTS).save()
    disturb()
    again = resumed(tmp_path, **PARTS)
    assert again.step == 0
    again.fit()
    same(tmp_path, whole)


@pytest.mark.fault(2)
@pytest.mark.parametrize("cut", [15, 30])
def test_from_the_end_of_an_epoch(whole, tmp_path, cut):
    run = trainer(tmp_path, At(cut, stop), **PARTS).fit()
    assert cut*6 % len(run.datasets.train) == 0
    disturb()
    resumed(tmp_path, **PARTS).fit()
    same(tmp_path, whole)


def in_window(run, step, do):
    "Do something when the second of a step's three parts enters the network."
    calls = []

    def hook(*_):
        if run.step == step:
            calls.append(step)
            if len(calls) == 2: do()
    run.objective.averaged.register_forward_pre_hook(hook)
    return run


class Crash(Exception): pass


@pytest.mark.fault(2)
def test_a_crash_inside_an_accumulation_window(whole, tmp_path):
    "What half of the batch has added is forgotten: the last whole step counts."
    def crash(): raise Crash
    with pytest.raises(Crash): in_window(trainer(tmp_path, **PARTS), 17, crash).fit()
    assert find_checkpoint(tmp_path).name == "step_00000015"
    disturb()
    resumed(tmp_path, **PARTS).fit()
    same(tmp_path, whole)


@pytest.mark.fault(2)
@pytest.mark.fault(4)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_inside_an_accumulation_window(whole, tmp_path, name):
    "The step is finished and saved, and the handlers of before are back."
    sent, mine = getattr(signal, name), lambda *_: None
    names = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    old = {s: signal.signal(s, mine) for s in names}
    try:
        run = in_window(trainer(tmp_path, **PARTS), 16, lambda: os.kill(os.getpid(), sent)).fit()
        assert [signal.getsignal(s) for s in names] == [mine]*3
    finally:
        for s, handler in old.items(): signal.signal(s, handler)
    assert run.step == 17 and run.stopped_by == sent
    assert find_checkpoint(tmp_path).name == "step_00000017"
    resumed(tmp_path, **PARTS).fit()
    same(tmp_path, whole)


@pytest.mark.fault(4)
def test_handlers_come_back_after_a_crash_too(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    def crash(trainer): raise Crash
    with pytest.raises(Crash): trainer(tmp_path, At(2, crash)).fit()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.fault(4)
@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_the_command_ends_as_a_shell_expects(tmp_path, monkeypatch, command, name, code):
    class Send(Callback):
        def begin(self, trainer):
            in_window(trainer, 3, lambda: os.kill(os.getpid(), getattr(signal, name)))
    default = training.default_callbacks
    monkeypatch.setattr(training, "default_callbacks", lambda cfg: [*default(cfg), Send()])
    command.train(*words(tmp_path, **PARTS))
    assert command.code == code and "stopped at step 4, and saved" in command.out
    assert f"--resume {tmp_path}" in command.out and steps(tmp_path) == [4]


# -- kill -9

KILLER = """
import json, os, random, signal, sys, time, warnings
from pathlib import Path
import torch
torch.set_num_threads(1)  # a fork has no threads
from diffusion_model.checkpoint import load_checkpoint, wait_for_checkpoints
from diffusion_model.tracking import read_metrics
from runs import Callback, hashes, trainer
warnings.simplefilter("error")  # nothing may even look damaged
folder, EVERY = Path(sys.argv[1]), 5

class Begun(Callback):
    def __init__(self, pipe): self.pipe = pipe
    def begin(self, trainer): os.write(self.pipe, b".")

def start(folder, die_at_sync=None):
    "A process that begins, or goes on, and may kill itself just before it writes through."
    heard, pipe = os.pipe()
    if child := os.fork(): return child, heard
    sync, calls = os.fsync, []
    def fsync(handle):
        calls.append(handle)
        if len(calls) == die_at_sync: os.kill(os.getpid(), signal.SIGKILL)
        sync(handle)
    os.fsync = fsync
    run = trainer(folder, Begun(pipe), max_steps=100)
    if (folder/"checkpoints").exists(): run.resume(folder)
    run.fit()
    wait_for_checkpoints()
    os._exit(0)

def check(folder):
    "There is a valid checkpoint, and what is lost is at most what lies between two."
    there = load_checkpoint(folder).step
    rows = read_metrics(folder) if (folder/"metrics.jsonl").exists() else []
    made = max([row["step"] for row in rows], default=0)
    assert 0 <= made - there <= EVERY, (made, there)
    return there

begun = time.perf_counter()
assert os.waitpid(start(folder/"whole")[0], 0)[1] == 0
straight = time.perf_counter() - begun
found = []
trainer(folder/"killed", max_steps=100).save()  # without a save there is nothing to lose
wait_for_checkpoints()
for k in range(20):
    child, heard = start(folder/"killed")
    if k % 2: os.read(heard, 1)  # every second one is killed in its loop, the others anywhere
    time.sleep(random.uniform(0, straight/10))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    found.append(check(folder/"killed"))
for moment in range(1, 10):  # seven in each save: five files, their folder, its parent
    assert os.waitpid(start(folder/"killed", moment)[0], 0)[1] == signal.SIGKILL
    found.append(check(folder/"killed"))
assert os.waitpid(start(folder/"killed")[0], 0)[1] == 0
print(json.dumps([found, hashes(folder/"whole"), hashes(folder/"killed")]))
"""


@pytest.mark.fault(3)
@pytest.mark.slow_fault
def test_killed_at_twenty_random_moments_and_between_a_checkpoints_files(tmp_path):
    done = python(tmp_path, KILLER, tmp_path)
    assert done.returncode == 0, done.stderr
    found, whole, killed = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 29 and found == sorted(found) and 0 < found[19] < 100
    assert killed == whole and whole[0] == "step_00000100"


# -- another config

@pytest.fixture
def stopped(tmp_path):
    trainer(tmp_path, At(5, stop)).fit()
    return tmp_path


@pytest.mark.fault(11)
def test_a_changed_learning_rate_is_printed_and_allowed(stopped, command):
    command.train("--resume", stopped, "--learning_rate", "1e-4", "--max_steps", "7")
    assert command.code == 0, command.err
    for line in ("training.learning_rate: 0.002 -> 0.0001", "training.max_steps: 40 -> 7",
                 "resumed at step 5"):
        assert line in command.out.splitlines()
    assert steps(stopped) == [5, 7]


@pytest.mark.fault(11)
def test_another_architecture_is_refused(stopped, command):
    before = hashes(stopped)
    command.train("--resume", stopped, "--base_channels", "16")
    command.says(2, "model.base_channels: was 8", "is 16 now", "put these back", "--output_dir")
    assert hashes(stopped) == before


@pytest.mark.fault(11)
def test_a_field_that_this_version_does_not_know(stopped, command):
    file = stopped/"config.yaml"
    file.write_text(file.read_text().replace("training:\n", "training:\n  lerning_rate: 1\n"))
    command.train("--resume", stopped)
    command.says(2, "training.lerning_rate: no such field", "did you mean learning_rate?")
    assert steps(stopped) == [5]
