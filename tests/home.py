"""Write the project's home where readers look for it: one address, from one place.

    python tests/home.py https://github.com/OWNER/REPOSITORY [https://OWNER.github.io/REPOSITORY]

It writes [project.urls] in pyproject.toml, and an install cell and an "Open in Colab" badge into
each notebook; `make export` then makes absolute links of it in README.md and llms.txt. The
workflow runs it for the repository that it runs in; while the project has no home, none of this is
there. Run it again to move.
"""
import argparse, json, re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BADGE, INSTALL = "[![Open in Colab]", "![ -e /content ]"  # by these texts the cells are known


def cells(page: str, home: str) -> list[dict]:
    "The badge and the install cell of a notebook; `page` is its path in nbs/."
    where = home.removeprefix("https://github.com/")
    link = f"https://colab.research.google.com/github/{where}/blob/main/nbs/{page}"
    badge = f"{BADGE}(https://colab.research.google.com/assets/colab-badge.svg)]({link})"
    install = ("#| hide\n# Colab lacks the library; elsewhere this does nothing.\n"
               f"{INSTALL} && pip install --quiet 'diffusion_model[avatars] @ git+{home}'")
    code = {"cell_type": "code", "execution_count": None, "id": "colab1", "outputs": [],
            "metadata": {"jupyter": {"source_hidden": True}},
            "source": install.splitlines(keepends=True)}
    return [{"cell_type": "markdown", "id": "colab0", "metadata": {}, "source": [badge]}, code]


def write_urls(path: Path, home: str, site: str) -> None:
    "[project.urls], whatever stood there before."
    text = re.sub(r"^\[project\.urls\]\n(?:.+\n)*\n?", "", path.read_text(), flags=re.M)
    urls = {"Repository": home, "Documentation": site, "Issues": f"{home}/issues",
            "Changelog": f"{home}/blob/main/CHANGELOG.md"}
    table = "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    scripts = "[project.scripts]"
    path.write_text(text.replace(scripts, f"[project.urls]\n{table}\n{scripts}"))


def write_cells(path: Path, page: str, home: str) -> None:
    "The badge below the opening, and the install cell before the first code cell."
    book = json.loads(path.read_text())
    old = [c for c in book["cells"]
           if not any(text in "".join(c["source"]) for text in (BADGE, INSTALL))]
    badge, install = cells(page, home)
    first = next((i for i, c in enumerate(old) if c["cell_type"] == "code"), None)
    if first is not None: old.insert(first, install)
    book["cells"] = [*old[:2], badge, *old[2:]] if first is not None else old
    path.write_text(json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def main(arguments: list[str] = None, root: Path = ROOT) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("home", help="https://github.com/OWNER/REPOSITORY")
    parser.add_argument("site", nargs="?", help="of the documentation; default: GitHub Pages'")
    args = parser.parse_args(arguments)
    found = re.fullmatch(r"(https://github\.com/([\w.-]+)/([\w.-]+?))(?:\.git)?/?", args.home)
    if not found: parser.error(f"home: found '{args.home}'; allowed: "
                               "https://github.com/OWNER/REPOSITORY")
    home, owner, repository = found.groups()
    write_urls(root/"pyproject.toml", home, args.site or f"https://{owner}.github.io/{repository}")
    for path in sorted((root/"nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        write_cells(path, path.relative_to(root/"nbs").as_posix(), home)


if __name__ == "__main__": main()
