"""Every notebook, run from top to bottom as Jupyter runs it: a plain kernel, nothing but the built
wheel, and an empty folder. Its exercises wait, know their solution, and tell a wrong answer so."""
import ast, os, re, subprocess, sys, tomllib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from pages import NAMES, NOTEBOOKS, ROOT


def code_cells(path): return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


def exercises(cells):
    "{name of the check: {what: index of the cell}}; what: check, waiting, solution."
    found = {}
    for i, cell in enumerate(cells):
        for name in re.findall(r"^@exercise\ndef (\w+)", cell.source, re.M):
            found[name] = {"check": i}
        for name in re.findall(r"^(\w+)\(", cell.source, re.M):
            if name not in found or i == found[name]["check"]: continue
            kind = "solution" if "Show a solution" in cell.source else "waiting"
            assert kind not in found[name], f"{name} has two cells that are its {kind}"
            found[name][kind] = i
    return found


def wrong_answers(path):
    "{name of the check: code of a wrong answer}, from tests/wrong_answers/NOTEBOOK.txt."
    file = ROOT/"tests"/"wrong_answers"/f"{path.stem}.txt"
    if not file.is_file(): return {}
    parts = re.split(r"^== (\w+)\n", file.read_text(), flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2]))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_exercises_are_whole(path):
    "A folded check, a cell that waits, a folded solution, and a wrong answer to plant."
    cells = code_cells(path)
    found, wrong = exercises(cells), wrong_answers(path)
    for name, where in found.items():
        lacks = {"check", "waiting", "solution"} - set(where)
        assert not lacks, f"{path.name}: {name} has no cell that is its {lacks}"
        assert where["check"] < where["waiting"] < where["solution"]
        for kind in ("check", "solution"):
            cell = cells[where[kind]]
            assert "code-fold: true" in cell.source, f"{path.name}: {name}: fold its {kind}"
            assert cell.metadata.get("jupyter", {}).get("source_hidden"), (
                f"{path.name}: {name}: hide the source of its {kind} in Jupyter")
    assert set(found) == set(wrong), f"{path.name}: a wrong answer for each of {sorted(found)}"
    solutions = sum("Show a solution" in c.source for c in cells)
    assert solutions == len(found), f"{path.name}: {solutions} solutions, {len(found)} checks"


# The shortest queue for two processes: what takes longest is begun first.
LONG_FIRST = sorted(NOTEBOOKS, key=lambda p: (p.parent == ROOT/"nbs", p.stat().st_size < 100_000))


@pytest.mark.parametrize("path", LONG_FIRST, ids=[p.stem for p in LONG_FIRST])
def test_runs_in_jupyter(path, wheel, tmp_path, monkeypatch):
    "Run all cells; wrong answers are planted under those that wait."
    book = nbformat.read(path, 4)
    cells = [c for c in book.cells if c.cell_type == "code"]
    found, wrong = exercises(cells), wrong_answers(path)
    planted = {}
    for name, where in found.items():
        waiting = cells[where["waiting"]]
        call = re.search(rf"^{name}\(.*\)", waiting.source, re.M)[0]
        planted[name] = nbformat.v4.new_code_cell(f"{wrong[name].strip()}\n\n{call}")
        book.cells.insert(book.cells.index(waiting) + 1, planted[name])
    monkeypatch.delenv("IN_TEST", raising=False)
    env = os.environ | {"PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1"}
    client = NotebookClient(book, timeout=300, resources={"metadata": {"path": tmp_path}})
    client.execute(env=env)

    def said(cell):
        return "".join(o.text for o in cell.outputs if o.get("name") == "stdout")
    for name, where in found.items():
        assert "Your turn" in said(cells[where["waiting"]]), name
        assert "Not yet" in said(planted[name]), f"{name}: {wrong[name]}: {said(planted[name])}"
        praised = said(cells[where["solution"]])
        assert "Right!" in praised, f"{name}: {praised}"


def test_nbdev_runs_a_notebook():
    "nbdev's own command, as `make notebooks` and users call it."
    command = [Path(sys.executable).parent/"nbdev_test", "nbs/exercises.ipynb", "--n-workers", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_notebooks_need_only_what_the_package_needs():
    "Whoever has installed the wheel can run every notebook, but for an extra it begins by naming."
    project = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]
    installed = {re.match(r"[\w-]+", d)[0].lower() for d in project["dependencies"]}
    # by other names: what pillow, pyyaml, ipywidgets, matplotlib and pydantic bring
    installed |= {"pil", "yaml", "ipython", "mpl_toolkits", "pydantic_core"}
    extras = {"dicebear": "avatars"}
    for path in NOTEBOOKS:
        told = next(c.source for c in nbformat.read(path, 4).cells[1:] if c.cell_type == "markdown")
        for cell in code_cells(path):
            source = re.sub(r"^\s*[%!].*", "pass", cell.source, flags=re.M)
            for node in ast.parse(source).body:  # not what a function asks for when it is called
                found = [node.module] if isinstance(node, ast.ImportFrom) else \
                    [a.name for a in node.names] if isinstance(node, ast.Import) else []
                for module in found:
                    root = module.split(".")[0]
                    known = root in sys.stdlib_module_names or root == "diffusion_model"
                    if root in extras: known = f"diffusion_model[{extras[root]}]" in told
                    assert known or root.lower() in installed, f"{path.name} imports {root}"
