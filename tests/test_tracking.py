"Trackers: edges of the metrics file, failing trackers, dashboards, what a run says of itself."
import io
import json
import math
import subprocess
import sys
import types
import warnings

import numpy as np
import pytest
import torch

import diffusion_model.tracking as tracking
from diffusion_model.config import Config
from diffusion_model.tracking import (
    Average, MetricsFile, ProgressBar, ProgressLines, TensorBoard, Tracker, Trackers, WandB,
    create_console, create_trackers, git_commit, read_metrics, record_start, run_metadata)


def steps(path): return [row["step"] for row in read_metrics(path)]


def strict(text):
    "JSON as the standard has it: NaN and Infinity are errors."
    def refuse(name): raise AssertionError(name)
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# ---------------------------------------------------------------------------- the metrics file

@pytest.mark.parametrize("value, written", [
    (math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity"),
    (torch.tensor(math.nan), "NaN"), (np.float32(math.inf), "Infinity")])
def test_numbers_that_json_does_not_know(tmp_path, value, written):
    file = MetricsFile(tmp_path/"metrics.jsonl")
    file.log(1, {"loss": value})
    assert strict(file.path.read_text()) == [{"step": 1, "loss": written}]
    read = read_metrics(file.path)[0]["loss"]
    assert isinstance(read, float) and (read == float(value) or math.isnan(float(value)))


def test_each_line_is_there_at_once(tmp_path):
    file = MetricsFile(tmp_path/"metrics.jsonl")
    for k in (1, 2, 3):
        file.log(k, {"loss": k, "lr": torch.tensor(0.5), "n": np.int64(7)})
        assert steps(tmp_path) == list(range(1, k + 1))
    assert read_metrics(tmp_path)[-1] == {"step": 3, "loss": 3, "lr": 0.5, "n": 7}


@pytest.mark.parametrize("start, kept", [(0, []), (1, []), (50, [50]), (120, [50, 100]),
                                         (150, [50, 100, 150]), (10**6, [50, 100, 150])])
def test_resume_cuts_what_will_be_told_again(tmp_path, start, kept):
    file = MetricsFile(tmp_path/"metrics.jsonl")
    for k in (50, 100, 150): file.log(k, {"loss": math.nan})
    file.close()
    MetricsFile(file.path, start_step=start).close()
    assert steps(tmp_path) == kept
    assert len(strict(file.path.read_text())) == len(kept)  # NaN survives the copy as valid JSON
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_an_interrupted_and_a_whole_run_tell_the_same(tmp_path):
    whole = MetricsFile(tmp_path/"whole.jsonl")
    for k in range(1, 41): whole.log(k, {"loss": 1/k})
    cut = MetricsFile(tmp_path/"cut.jsonl")
    for k in range(1, 30): cut.log(k, {"loss": 1/k})
    cut.file.write('{"step": 30, "lo')
    cut.close()
    again = MetricsFile(tmp_path/"cut.jsonl", start_step=17)
    for k in range(18, 41): again.log(k, {"loss": 1/k})
    assert whole.path.read_bytes() == again.path.read_bytes()


def test_an_unfinished_last_line_is_no_news(tmp_path):
    path = tmp_path/"metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n{"step": 2, "lo')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert steps(path) == [1]


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"loss": 1}', '{"step": "x"}', "\x00\x00"])
def test_other_broken_lines_are_named(tmp_path, line):
    path = tmp_path/"metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.warns(UserWarning, match=r"metrics.jsonl: 1 lines are not metrics, first line 2"):
        assert steps(path) == [1, 3]


def test_no_file_and_empty_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no metrics at .*metrics.jsonl"):
        read_metrics(tmp_path)
    (tmp_path/"metrics.jsonl").touch()
    assert read_metrics(tmp_path) == []


# ---------------------------------------------------------------------------- the average

@pytest.mark.parametrize("beta", [0., 0.5, 0.98])
def test_average_is_the_explicit_weighted_sum(beta):
    values = np.random.default_rng(0).normal(size=50)
    average = Average(beta)
    for n, v in enumerate(values, 1):
        got = average.update(v)
        weights = beta**np.arange(n - 1, -1, -1, dtype=float)
        assert abs(got - weights @ values[:n]/weights.sum()) < 1e-12


def test_average_leaves_out_what_is_not_finite():
    average = Average(0.9)
    assert math.isnan(average.value)
    for v in (2., math.nan, math.inf, 2.): average.update(v)
    assert average.value == pytest.approx(2., abs=1e-15)


@pytest.mark.parametrize("beta", [-0.1, 1., 2.])
def test_average_refuses_a_beta(beta):
    with pytest.raises(ValueError, match="beta: found"): Average(beta)


# ---------------------------------------------------------------------------- the console

class Terminal(io.StringIO):
    def isatty(self): return True


def test_console_is_a_bar_only_in_a_terminal():
    bar, lines = create_console(10, stream=Terminal()), create_console(10, stream=io.StringIO())
    assert isinstance(bar, ProgressBar) and isinstance(lines, ProgressLines)
    bar.close()


def test_bar_starts_where_the_run_does_and_ends_full():
    out = Terminal()
    bar = ProgressBar(200, start_step=100, stream=out)
    assert bar.bar.n == 100
    for k in range(120, 201, 20): bar.log(k, {"loss": 0.25, "images_per_second": 12.})
    bar.log(200, {"validation_loss": 3.})  # not a step of training
    assert bar.bar.n == 200
    bar.close()
    assert "loss 0.2500  12 images/s" in out.getvalue() and "200/200" in out.getvalue()


def test_plain_lines_are_few_and_the_last_is_shown():
    now, out = [0.], io.StringIO()
    lines = ProgressLines(1000, every=30., stream=out, clock=lambda: now[0])
    for k in range(1, 1001):
        lines.log(k, {"loss": 0.5})
        lines.log(k, {"validation_loss": 1.})
        now[0] += 0.1
    lines.close()
    shown = out.getvalue().splitlines()
    assert len(shown) == 5 and shown[0] == "step 1/1000  loss 0.5000"
    assert shown[-1].startswith("step 1000/1000") and shown[-1].endswith("0:00:00 left")
    assert "\r" not in out.getvalue() and "validation" not in out.getvalue()


def test_nothing_told_nothing_shown():
    out = io.StringIO()
    ProgressLines(10, stream=out).close()
    assert out.getvalue() == ""


# ---------------------------------------------------------------------------- together

class Recorder(Tracker):
    def __init__(self): self.told = []
    def log(self, step, values): self.told.append((step, values))
    def images(self, step, name, grid): self.told.append((step, name))
    def close(self): self.told.append("closed")


@pytest.mark.fault(27)
@pytest.mark.parametrize("where", ["make", "log", "images", "close"])
def test_one_that_fails_is_left_out_with_one_warning(where):
    class Broken(Tracker):
        def __init__(self):
            if where == "make": raise PermissionError("read-only")

    def fail(self, *args): raise OSError("No space left on device")
    if where != "make": setattr(Broken, where, fail)
    good = Recorder()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        both = Trackers({"broken": Broken, "good": lambda: good})
        for k in (1, 2): both.log(k, {"loss": 1.})
        for k in (1, 2): both.images(k, "samples", np.zeros((2, 2, 3), np.uint8))
        both.close()
    assert len(caught) == 1 and "tracker broken failed" in str(caught[0].message)
    assert good.told == [(1, {"loss": 1.}), (2, {"loss": 1.}), (1, "samples"), (2, "samples"),
                         "closed"]


def test_ctrl_c_is_not_swallowed():
    class Stop(Tracker):
        def log(self, step, values): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): Trackers({"stop": Stop}).log(1, {})


def test_closing_twice_is_harmless():
    good = Recorder()
    both = Trackers({"good": lambda: good})
    both.close()
    both.close()
    assert good.told == ["closed"]


def config(**logging): return Config(logging=dict(progress=False, **logging))


def test_factory_makes_what_is_asked_for(tmp_path, monkeypatch):
    assert list(create_trackers(config(), tmp_path).active) == ["metrics.jsonl"]
    cfg = Config(logging=dict(progress=True))
    assert list(create_trackers(cfg, tmp_path).active) == ["metrics.jsonl", "console"]


@pytest.mark.fault(27)
def test_a_blocked_tensorboard_folder_is_a_warning(tmp_path):
    (tmp_path/"tensorboard").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="tracker tensorboard failed"):
        trackers = create_trackers(config(trackers=["tensorboard"]), tmp_path)
    trackers.log(1, {"loss": 1.})
    assert steps(tmp_path) == [1]


@pytest.mark.fault(27)
def test_a_missing_wandb_is_a_warning_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning, match=r"pip install 'diffusion_model\[wandb\]'"):
        trackers = create_trackers(config(trackers=["wandb"]), tmp_path)
    trackers.log(1, {"loss": 1.})
    assert steps(tmp_path) == [1]


# ---------------------------------------------------------------------------- dashboards

def scalars(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(name)], events.Tags()["images"]


def test_tensorboard_holds_numbers_and_pictures(tmp_path):
    board = TensorBoard(tmp_path)
    for k in (1, 2): board.log(k, {"loss": torch.tensor(0.5*k)})
    board.images(2, "samples", np.zeros((4, 4, 3), np.uint8))
    board.close()
    assert scalars(tmp_path, "loss") == ([(1, 0.5), (2, 1.)], ["samples"])


def test_tensorboard_hides_what_a_resumed_run_tells_again(tmp_path):
    import time
    board = TensorBoard(tmp_path)
    for k in (1, 2, 3): board.log(k, {"loss": 1.})
    board.close()
    time.sleep(1.1)  # event files are ordered by their second
    board = TensorBoard(tmp_path, start_step=1)
    for k in (2, 3): board.log(k, {"loss": 2.})
    board.close()
    assert scalars(tmp_path, "loss")[0] == [(1, 1.), (2, 2.), (3, 2.)]


def test_wandb_goes_on_in_its_old_page(tmp_path, monkeypatch):
    calls, told = [], []

    def init(**options):
        calls.append(options)
        return types.SimpleNamespace(id=options["id"] or "abc", finish=lambda: told.append("end"),
                                     log=lambda values, step: told.append((step, values)))
    monkeypatch.setitem(sys.modules, "wandb",
                        types.SimpleNamespace(init=init, Image=lambda g: g.shape))
    for _ in range(2):
        run = WandB(tmp_path, "project", {"a": 1})
        run.log(3, {"loss": torch.tensor(0.5)})
        run.images(3, "samples", np.zeros((2, 2, 3)))
        run.close()
    assert [c["id"] for c in calls] == [None, "abc"]
    assert calls[0]["project"] == "project" and calls[0]["config"] == {"a": 1}
    assert told == [(3, {"loss": 0.5}), (3, {"samples": (2, 2, 3)}), "end"]*2


# ---------------------------------------------------------------------------- what made the run

def test_metadata_is_plain_json_and_true():
    data = run_metadata()
    assert json.loads(json.dumps(data)) == data
    assert data["torch"] == torch.__version__ and data["device"] == "cpu"
    assert data["python"] == ".".join(map(str, sys.version_info[:3]))
    assert data["started"].endswith("+00:00")


def test_each_start_is_one_line(tmp_path):
    for step in (0, 40): record_start(tmp_path/"new", step)
    rows = strict((tmp_path/"new"/"starts.jsonl").read_text())
    assert [r["step"] for r in rows] == [0, 40]


def git(folder, *command):
    return subprocess.run(["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c",
                           *command], check=True, capture_output=True, text=True).stdout.strip()


def test_commit_of_a_checkout_and_of_an_installed_library(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "PACKAGE", tmp_path)
    assert git_commit() is None  # no repository at all
    git(tmp_path, "init", "-q")
    (tmp_path/"__init__.py").write_text("a = 1\n")
    assert git_commit() is None  # a repository that does not own the package: installed inside one
    git(tmp_path, "add", "__init__.py")
    git(tmp_path, "commit", "-qm", "first")
    assert git_commit() == git(tmp_path, "rev-parse", "HEAD")
    (tmp_path/"__init__.py").write_text("a = 2\n")
    assert git_commit() == git(tmp_path, "rev-parse", "HEAD") + "+"


def test_no_git_installed(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None and run_metadata()["git_commit"] is None


def test_import_is_light():
    code = ("import sys, diffusion_model.tracking; "
            "print([m for m in ('torch', 'tqdm', 'tensorboard', 'wandb') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
