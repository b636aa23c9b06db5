"The site's pages as nbdev hands them to Quarto, which is not needed here."
import os, re, shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml

from pages import NAMES, ROOT, cells, source

pytestmark = pytest.mark.xdist_group("site")  # one process makes the copy, for all
PROCESS = """
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
if __name__ == "__main__":
    refresh_quarto_yml()
    proc_nbs(n_workers=2)
"""


def text_of(cell):
    "What a reader sees of a cell: its source, and what it printed or showed as Markdown."
    shown = [source(cell)]
    for output in cell.get("outputs", []):
        shown.append("".join(output.get("text", "")))
        shown += ["".join(v) for k, v in output.get("data", {}).items() if k.startswith("text/")]
    return "\n".join(shown)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The folder of processed pages."
    copy = tmp_path_factory.mktemp("site")/"project"
    for part in ("nbs", "diffusion_model"):
        shutil.copytree(ROOT/part, copy/part, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for file in ("pyproject.toml", "README.md"): shutil.copy(ROOT/file, copy)
    (copy/"process.py").write_text(PROCESS)
    done = subprocess.run([sys.executable, "process.py"], cwd=copy, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(copy)})
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr[-2000:]
    return copy/"_proc"


def test_every_page_is_there(site):
    pages = {str(p.relative_to(site)) for p in site.rglob("*.ipynb")}
    assert pages == set(NAMES)
    for file in ("llms.txt", "styles.css", "sidebar.yml", "images/film.gif",
                 "images/favicon.png", "images/social.png"):
        assert (site/file).is_file(), f"the site lacks {file}"


@pytest.mark.parametrize("name", NAMES)
def test_page_keeps_its_opening(site, name):
    "nbdev drops the first cell but for title and sentence; what follows it stands on the page."
    page = "\n".join(source(c) for c in cells(site/name))
    def words(text): return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "").split()
    opening = words(source(cells(ROOT/"nbs"/name)[1]))
    assert opening and " ".join(opening) in " ".join(words(page))


def test_front_page_shows_the_film(site):
    words = [source(c) for c in cells(site/"index.ipynb") if c["cell_type"] == "markdown"]
    assert any("images/film.gif" in text for text in words[:3])


@pytest.mark.parametrize("name", NAMES)
def test_page_shows_the_code_of_the_library(site, name):
    "Every definition of the module stands on its page; a heading to link to stands above it."
    page = [source(c) for c in cells(site/name)]
    for cell in cells(ROOT/"nbs"/name):
        text = source(cell)
        if cell["cell_type"] != "code" or not re.search(r"^#\| *exports?\b", text, re.M): continue
        body = "\n".join(x for x in text.splitlines() if not x.startswith("#|")).strip()
        defines = re.findall(r"^(?:@patch\n)?(?:class|def) ([a-zA-Z]\w*)", body, re.M)
        if re.search(r"^#\| *exports\b", text, re.M):
            assert any(body in shown for shown in page), f"the page does not show {body[:60]}"
        else: assert not defines, f"{name} hides the code of {defines}: write #| exports"


@pytest.mark.parametrize("name", NAMES)
def test_page_entries_say_what_they_are(site, name):
    for cell in cells(site/name):
        text = text_of({**cell, "source": ""})
        assert "(*args, **kwargs)" not in re.sub(r"\s+(?=\*)|(?<=kwargs)\s+", "", text)
        assert "__main__" not in text, text


@pytest.mark.parametrize("name", NAMES)
def test_figures_have_words(name):
    "Who cannot see a figure is told what is to be seen."
    for cell in cells(ROOT/"nbs"/name):
        images = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        alt = re.search(r'^#\| fig-alt: "([^"]+)"$', source(cell), re.M)
        if images: assert alt and len(alt[1]) > 20, f"{name}: no fig-alt: {source(cell)[:300]}"
        if cell["cell_type"] == "markdown":
            assert not re.search(r"!\[\]\(|<img(?![^>]*alt=)", source(cell)), source(cell)[:100]


def anchor(heading):
    "The identifier that Pandoc gives a heading."
    if explicit := re.search(r"\{[^}]*#([\w.-]+)[^}]*\}\s*$", heading): return explicit[1]
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"\{[^}]*\}\s*$", "", heading))
    text = re.sub(r"[^\w\s.-]", "", text).strip().lower()
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text))


def anchors(path):
    text = "\n".join(text_of(c) if "show_doc" in source(c) else source(c) for c in cells(path)
                     if c["cell_type"] == "markdown" or "show_doc" in source(c))
    return {anchor(h) for h in re.findall(r"^#+ +(.+)$", text, re.M)}


@pytest.fixture(scope="session")
def targets(site):
    "{page without its ending: its anchors}; pages go by the names of their files and of the site."
    found = {}
    for path in site.rglob("*.ipynb"):
        output = re.search(r"output-file: (\S+)\.html", source(cells(path)[0]))[1]
        folder = path.parent.relative_to(site)
        for stem in (path.stem, output): found[str(folder/stem)] = anchors(path)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_no_link_is_dead(site, targets, name):
    here = (site/name).parent
    for cell in cells(site/name):
        if cell["cell_type"] != "markdown": continue
        for link in re.findall(r"\]\(([^)\s]+)(?: [^)]*)?\)", source(cell)):
            if re.match(r"https?:|mailto:", link): continue
            file, _, part = link.partition("#")
            if not file: page = str(Path(name).with_suffix(""))
            else:
                path = site/file[1:] if file.startswith("/") else here/file
                if path.suffix not in (".ipynb", ".html"):
                    assert path.is_file(), f"{name} links to {link}"
                    continue
                page = os.path.relpath(path.with_suffix(""), site)
            assert page in targets, f"{name} links to {link}, and there is no such page"
            assert not part or part in targets[page], f"{name} links to {link}: no such heading"


def test_long_lines_wrap():
    "Nothing is cut off, and no page scrolls sideways."
    style = yaml.safe_load((ROOT/"nbs"/"_quarto.yml").read_text())["format"]["html"]
    assert style["code-overflow"] == "wrap"
    css = (ROOT/"nbs"/style["css"]).read_text()
    rules = {s.strip(): rule for block, rule in re.findall(r"([^{}]+)\{([^}]*)\}", css)
             for s in re.sub(r"/\*.*?\*/", "", block, flags=re.S).split(",")}
    assert "pre-wrap" in rules[".cell-output pre"]
    for wide in ("main table", ".math.display"): assert "overflow-x: auto" in rules[wide]


def test_sidebar_is_numbered_in_parts(site):
    bar = yaml.safe_load((site/"sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    pages = [bar[0]["href"]] + [p["href"] for part in bar[1:] for p in part["contents"]]
    assert sorted(pages) == sorted(NAMES)
    assert "What diffusion is" in [part.get("section") for part in bar]
    assert bar[1]["contents"][0]["text"].startswith("00 ")
