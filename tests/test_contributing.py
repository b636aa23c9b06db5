"The examples of CONTRIBUTING.md do what they say: each is run, after the beginning they share."
import importlib, re
from pathlib import Path

import pytest

TEXT = (Path(__file__).resolve().parent.parent/"CONTRIBUTING.md").read_text()
BLOCKS = {title: re.findall(r"^```python\n(.*?)^```", part, re.M | re.S)
          for title, part in re.findall(r"^### (.+?)\n(.*?)(?=^### |^## |\Z)", TEXT, re.M | re.S)}
BEGINNING = re.search(r"^```python\n(.*?)^```", TEXT, re.M | re.S)[1]
TABLE = re.findall(r"^\| ([\w ]+) \|.*?\| `(\w+)\.([A-Z]+)` \| `(\w+)\.(\w+)` \|", TEXT, re.M)
THINGS = ["network", "solver", "schedule", "data set", "objective", "space", "callback"]
TABLE_OF_OPTIONS = re.findall(
    r"^\| ([\w ]+) \|.*?\| `(\w+)\.([A-Z]+)` \| the option `--\w+` \|", TEXT, re.M)
CHOSEN_BY_OPTION = ["metric", "feature network"]


@pytest.fixture
def registries():
    "What an example registers is gone after it."
    tables = [getattr(importlib.import_module(f"diffusion_model.{module}"), name)
              for _, module, name, *_ in [*TABLE, *TABLE_OF_OPTIONS]]
    before = [dict(table) for table in tables]
    yield dict(zip([*THINGS, *CHOSEN_BY_OPTION], tables, strict=True))
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.parametrize("thing", [*THINGS, *CHOSEN_BY_OPTION])
def test_example(thing, registries, tmp_path, monkeypatch):
    "It runs, its assertions hold, and it is one entry of the registry that the table names."
    title = f"{'An' if thing[0] in 'aeiou' else 'A'} {thing}"
    code = "\n\n".join(BLOCKS[title])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = set(registries[thing])
    exec(compile(BEGINNING + code, f"CONTRIBUTING.md: {title}", "exec"), {"__name__": "example"})
    assert len(set(registries[thing]) - before) == 1, (
        f"CONTRIBUTING.md: {title}: makes no new entry: has the library one of that name now?")
    assert re.search(r"^assert ", code, re.M), "an example says what it shows"


def test_table_names_fields():
    "The fields that choose an entry are fields of the config."
    from diffusion_model.config import Config
    cfg = Config()
    assert [thing for thing, *_ in TABLE] == THINGS
    assert [thing for thing, *_ in TABLE_OF_OPTIONS] == CHOSEN_BY_OPTION
    for _, _, _, section, field in TABLE: assert hasattr(getattr(cfg, section), field)


def test_commands_are_there():
    "Each make target that is named has a rule."
    makefile = (Path(__file__).resolve().parent.parent/"Makefile").read_text()
    for target in re.findall(r"^make (\w+)", TEXT, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_readme(tmp_path, monkeypatch, capsys):
    "The README's Python, with the model that comes with the package, from any directory."
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).resolve().parent.parent/"README.md").read_text()
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S):
        exec(compile(block, "README.md", "exec"), names)
    assert names["images"].dtype == names["torch"].uint8 and len(names["images"]) == 8
    assert "0 torch.Size([64, 3, 32, 32])" in capsys.readouterr().out
