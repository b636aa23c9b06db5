"The project's address, written from one place: nothing of it while there is none."
import json, os, re, shutil, subprocess, sys, tomllib
from pathlib import Path

import pytest

import home
import pages

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.xdist_group("home")  # one process makes the copy, for all
HOME = "https://github.com/someone/diffusion_model"
HAS_HOME = "Repository" in pages.urls()


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    "A copy of the project that has been given a home, twice, and exported."
    copy = tmp_path_factory.mktemp("home")/"diffusion_model"
    for part in ("nbs", "diffusion_model", "tests"):
        shutil.copytree(ROOT/part, copy/part, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for file in ("pyproject.toml", "README.md"): shutil.copy(ROOT/file, copy)
    home.main(["https://github.com/other/place"], copy)
    bin, env = Path(sys.executable).parent, os.environ | {"PYTHONPATH": str(copy)}
    for command in ([bin/"nbdev-clean"], [sys.executable, "tests/home.py", HOME + ".git"],
                    [bin/"nbdev-export"], [bin/"nbdev-clean"],
                    [sys.executable, "tests/pages.py"]):
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return copy


@pytest.mark.skipif(HAS_HOME, reason="the project has a home")
def test_nothing_is_said_of_a_home_that_is_not_known():
    for path in (ROOT/"nbs").rglob("*.ipynb"):
        assert "colab" not in path.read_text(), path.name
    readme = (ROOT/"README.md").read_text()
    assert "](nbs/00_tour.ipynb)" in readme and "colab" not in readme


def test_urls_stand_in_one_table(moved):
    urls = tomllib.loads((moved/"pyproject.toml").read_text())["project"]["urls"]
    assert urls["Repository"] == HOME
    assert urls["Documentation"] == "https://someone.github.io/diffusion_model"
    assert "other/place" not in (moved/"pyproject.toml").read_text()


def test_readme_links_are_absolute(moved):
    text = (moved/"README.md").read_text()
    links = re.findall(r"\]\(([^)#][^)]*)\)", text)
    assert links and all(link.startswith("https://") for link in links)
    assert f"({HOME}/blob/main/nbs/00_tour.ipynb)" in text
    assert f"({HOME}/raw/main/nbs/images/film.gif)" in text
    assert f"({HOME}/blob/main/CONTRIBUTING.md)" in text


def test_llms_links_are_absolute(moved):
    text = (moved/"nbs"/"llms.txt").read_text()
    assert "(https://someone.github.io/diffusion_model/scheduler.html.md)" in text


@pytest.mark.parametrize("page", ["01_scheduler.ipynb",
                                  "tutorials/stop_kill_resume_spread_out.ipynb"])
def test_notebooks_open_in_colab(moved, page):
    cells = json.loads((moved/"nbs"/page).read_text())["cells"]
    sources = ["".join(c["source"]) for c in cells]
    badges = [s for s in sources if "colab-badge" in s]
    assert len(badges) == 1 and badges[0].endswith(
        f"(https://colab.research.google.com/github/someone/diffusion_model/blob/main/nbs/{page})")
    installs = [i for i, c in enumerate(cells) if "pip install" in sources[i]]
    assert [c["cell_type"] for c in cells].index("code") == installs[0] and len(installs) == 1
    assert f"git+{HOME}'" in sources[installs[0]]


def test_an_address_that_is_none_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit): home.main(["someone/diffusion_model"], tmp_path)
    assert "allowed: https://github.com/OWNER/REPOSITORY" in capsys.readouterr().err
