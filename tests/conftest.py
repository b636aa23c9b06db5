"Faults that a run must survive, or end at with a clear word; `make faults` prints how each fared."
import pytest

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


def pytest_itemcollected(item):
    "A report carries the numbers of the faults that its test is marked with."
    for mark in item.iter_markers("fault"):
        if mark.args[0] not in FAULTS:
            raise pytest.UsageError(f"{item.nodeid}: no fault {mark.args[0]} in {__file__}")
        item.user_properties.append(("fault", mark.args[0]))


def count(reporter):
    "{number: {outcome: tests}}."
    table = {n: dict.fromkeys(("passed", "failed", "skipped"), 0) for n in FAULTS}
    columns = {"passed": "passed", "skipped": "skipped", "failed": "failed", "error": "failed",
               "xfailed": "failed"}
    for outcome, column in columns.items():
        for report in reporter.stats.get(outcome, []):
            for name, n in report.user_properties:
                if name == "fault": table[n][column] += 1
    return table


def kept(row): return row["passed"] and not row["failed"]


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("markexpr") != "fault": return
    table = count(terminalreporter)
    terminalreporter.section("faults")
    head = f"{'':3}{'fault':38}{'tests':>6}{'passed':>8}{'failed':>8}{'skipped':>9}"
    terminalreporter.write_line(head)
    for n, row in table.items():
        numbers = f"{sum(row.values()):6}{row['passed']:8}{row['failed']:8}{row['skipped']:9}"
        terminalreporter.write_line(f"{n:2} {FAULTS[n]:38}{numbers}", green=bool(kept(row)),
                                    red=not kept(row))
    terminalreporter.write_line(f"{sum(map(bool, map(kept, table.values())))} of {len(FAULTS)}")


def pytest_sessionfinish(session, exitstatus):
    "Asked for all faults, it is a failure if one of them has no test that passes."
    config = session.config
    if config.getoption("markexpr") != "fault" or config.args_source != config.ArgsSource.TESTPATHS:
        return
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == 0 and not all(map(kept, count(reporter).values())): session.exitstatus = 1
