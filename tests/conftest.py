"Faults that a run must survive, or end at with a clear word; `make faults` prints how each fared."
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from filelock import FileLock

from diffusion_model.cli import sample_command, train_command

ROOT = Path(__file__).resolve().parent.parent

# Who starts the tests in the background may have switched these off, for them and what they start.
for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) == signal.SIG_IGN: signal.signal(number, usual)

FAULTS = {
    1: "resume in mid-epoch", 2: "resume at edges", 3: "kill -9", 4: "SIGTERM, SIGUSR1, Ctrl-C",
    5: "disk full", 6: "$TMPDIR unusable", 7: "keep-last-1, and the save fails",
    8: "newest checkpoint truncated or empty", 9: "one flipped bit", 10: "malicious pickle",
    11: "config changed between runs", 12: "wrong weights file",
    13: "2 processes, then 1", 14: "workers 0/2/4", 15: "bad images", 16: "folder traps",
    17: "NaN and Inf, on one process", 18: "out of memory", 19: "YAML traps", 20: "typo",
    21: "fields that clash", 22: "path traversal", 23: "a process is killed",
    24: "uneven data, signal to one process", 25: "two runs, one directory",
    26: "device tags", 27: "tracker fails"}

MENDED = {
    1: "a signal to the whole process group", 2: "killed in the first save",
    3: "parameters without a gradient", 4: "editing on a device", 5: "Apple GPUs: no float64",
    6: "dropout on the run's own device", 7: "what the validation loss weighs",
    8: "resume with other data", 9: "two callbacks of one class", 10: "base_channels: 2",
    11: "waits for the device in a step", 12: "a Step kept, two samplers at once",
    13: "the oracle's memory, a time an image", 14: "memory of the loader's workers",
    15: "assertions that could not fail", 16: "nothing lost at the end",
    17: "disk and directory", 18: "resume: classes, images, config gone",
    19: "sampling's own options and batches", 20: "data: pipes, stray files, names",
    21: "words: encodings, numbers, ranks"}

TABLES = {"fault": FAULTS, "mended": MENDED}


def pytest_itemcollected(item):
    "A report carries the numbers of the faults that its test is marked with."
    for kind, names in TABLES.items():
        for mark in item.iter_markers(kind):
            if mark.args[0] not in names:
                raise pytest.UsageError(f"{item.nodeid}: no {kind} {mark.args[0]} in {__file__}")
            item.user_properties.append((kind, mark.args[0]))


def asked(config):
    "The tables that were asked for: `-m 'fault or mended'`, or one of them."
    words = config.getoption("markexpr").split(" or ")
    return [kind for kind in TABLES if kind in words] if set(words) <= set(TABLES) else []


def count(reporter, kind):
    "{number: {outcome: tests}}."
    table = {n: dict.fromkeys(("passed", "failed", "skipped"), 0) for n in TABLES[kind]}
    columns = {"passed": "passed", "skipped": "skipped", "failed": "failed", "error": "failed",
               "xfailed": "failed"}
    for outcome, column in columns.items():
        for report in reporter.stats.get(outcome, []):
            for name, n in report.user_properties:
                if name == kind: table[n][column] += 1
    return table


def kept(row): return row["passed"] > 0 and not row["failed"]


def pytest_terminal_summary(terminalreporter, config):
    write = terminalreporter.write_line
    for kind in [] if config.option.collectonly else asked(config):
        table = count(terminalreporter, kind)
        terminalreporter.section({"fault": "faults", "mended": "faults that were mended"}[kind])
        write(f"{'':3}{'fault':38}{'tests':>6}{'passed':>8}{'failed':>8}{'skipped':>9}")
        for n, row in table.items():
            numbers = f"{sum(row.values()):6}{row['passed']:8}{row['failed']:8}{row['skipped']:9}"
            write(f"{n:2} {TABLES[kind][n]:38}{numbers}", green=kept(row), red=not kept(row))
        write(f"{sum(map(kept, table.values()))} of {len(table)}")


def pytest_sessionfinish(session, exitstatus):
    "Asked for all faults, it is a failure if one of them has no test that passes."
    config = session.config
    if config.args_source != config.ArgsSource.TESTPATHS: return
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    tables = [count(reporter, kind) for kind in asked(config)]
    if exitstatus == 0 and not all(kept(row) for table in tables for row in table.values()):
        session.exitstatus = 1


class Command:
    "The commands in this process: exit code, and what they print."
    def __init__(self, capsys): self.capsys = capsys

    def __call__(self, command, argv):
        self.capsys.readouterr()
        try: self.code = command([str(a) for a in argv])
        except SystemExit as error: self.code = error.code
        self.out, self.err = self.capsys.readouterr()
        assert "Traceback" not in self.err
        return self

    def train(self, *argv): return self(train_command, argv)
    def sample(self, *argv): return self(sample_command, argv)

    def says(self, code, *parts):
        "The exit code, and that all of these words are in the complaint."
        assert self.code == code, (self.code, self.err)
        for part in parts: assert str(part) in self.err, (part, self.err)


@pytest.fixture
def command(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # the commands set their own
    return Command(capsys)


@pytest.fixture
def background():
    "`subprocess.Popen` whose processes end with the test, also where it fails."
    begun = []
    def begin(*args, **options):
        begun.append(subprocess.Popen(*args, **options))
        return begun[-1]
    yield begin
    for process in begun:
        if process.poll() is None: process.kill()
        process.wait()


@pytest.fixture
def nothing_left_behind():
    "The test ends once its last save is on the disk."
    yield
    from diffusion_model.checkpoint import wait_for_checkpoints
    wait_for_checkpoints()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "A folder with the package as its wheel installs it."
    top = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for arguments in (["wheel", "--no-deps", "--wheel-dir", top, ROOT],
                      ["install", "--no-deps", "--target", top/"installed", "--no-index",
                       "--find-links", top, "diffusion_model"]):
        with FileLock(tmp_path_factory.getbasetemp().parent/"wheel.lock"):  # ROOT/build is one
            done = subprocess.run([*pip, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return top/"installed"
