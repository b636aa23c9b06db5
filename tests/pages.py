"""What is made from the index page: README.md, the site's sidebar, and llms.txt; and on that page
the figures of the first screen (tests/front.py).

    python tests/pages.py    # `make export` does it too

The map in nbs/index.ipynb is the one list of all pages. Where [project.urls] in pyproject.toml
names the project's home, links in README.md are absolute, as a package index needs them.
"""
import json, re, tomllib
from pathlib import Path

import yaml

import front

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
NAMES = [str(p.relative_to(ROOT/"nbs")) for p in NOTEBOOKS]


def cells(notebook: Path) -> list[dict]: return json.loads(notebook.read_text())["cells"]

def source(cell: dict) -> str: return "".join(cell["source"])


def urls(root: Path = ROOT) -> dict[str, str]:
    "[project.urls]; empty while the project has no home."
    return tomllib.loads((root/"pyproject.toml").read_text())["project"].get("urls", {})


def index(root: Path = ROOT) -> str:
    "The index page, with the figures that the models' cards give now."
    path = root/"nbs"/"index.ipynb"
    book = json.loads(path.read_text())
    for cell in book["cells"]:
        if source(cell).startswith(front.MARK):
            cell["source"] = front.text(root).splitlines(keepends=True)
    return json.dumps(book, indent=1, ensure_ascii=False) + "\n"


def readme(root: Path = ROOT) -> str:
    "The index page as Markdown, its links made to work from where it is read."
    from nbconvert import MarkdownExporter
    text, _ = MarkdownExporter().from_filename(str(root/"nbs"/"index.ipynb"))
    home = urls(root).get("Repository", "").rstrip("/")

    def link(found):
        image, target = found[1], found[2]
        path = target.removeprefix("../") if target.startswith("../") else f"nbs/{target}"
        if not home: return f"{image}({path})"
        return f"{image}({home}/{'raw' if image.startswith('!') else 'blob'}/main/{path})"
    return re.sub(r"(!?\[[^\]]*\])\((?!https?:|#)([^)]+)\)", link, text).strip() + "\n"


def pages(root: Path = ROOT) -> list[tuple[str, list[tuple[str, str, str]]]]:
    "The map, part by part: [(part, [(page, its name in the map, what it teaches), ...]), ...]."
    text = "\n".join(map(source, cells(root/"nbs"/"index.ipynb")))
    parts = []
    for first, second in re.findall(r"^\| (.+?) \| (.*?) ?\|$", text, re.M):
        if heading := re.fullmatch(r"\*\*(.+)\*\*", first): parts.append((heading[1], []))
        for name, page in re.findall(r"\[([^\]]+)\]\(([\w/]+\.ipynb)\)", first):
            parts[-1][1].append((page, name, second))
    return parts


def sidebar(root: Path = ROOT) -> str:
    "sidebar.yml: the pages in parts, with their numbers."
    contents = [{"text": "Home", "href": "index.ipynb"}]
    for part, listed in pages(root):
        links = [{"text": name[:1].upper() + name[1:], "href": page} for page, name, _ in listed]
        contents.append({"section": part, "contents": links})
    text = yaml.safe_dump({"website": {"sidebar": {"contents": contents}}}, sort_keys=False,
                          allow_unicode=True)
    return "# Made from the map in index.ipynb by tests/pages.py\n" + text


def title(path: Path) -> tuple[str, str]:
    "A notebook's title, and the sentence below it."
    first = source(cells(path)[0])
    return re.match(r"# (.+)\n\n> (.+)", first).groups()


def llms(root: Path = ROOT) -> str:
    "llms.txt (llmstxt.org): every page, with its sentence, as Markdown that a machine reads."
    site = urls(root).get("Documentation", "").rstrip("/")
    name, sentence = title(root/"nbs"/"index.ipynb")
    lines = [f"# {name}", "", f"> {sentence}", ""]
    for part, listed in [("Start", [("index.ipynb", "", "")]), *pages(root)]:
        lines += [f"## {part}", ""]
        for page, *_ in listed:
            name, sentence = title(root/"nbs"/page)
            folder, _, file = page.rpartition("/")
            html = re.sub(r"^\d+_", "", file.removesuffix(".ipynb")) + ".html.md"
            where = "/".join(x for x in (site, folder, html) if x)
            lines.append(f"- [{name}]({where}): {sentence}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


MADE = {"nbs/index.ipynb": index, "README.md": readme, "nbs/sidebar.yml": sidebar,
        "nbs/llms.txt": llms}

if __name__ == "__main__":
    for file, make in MADE.items(): (ROOT/file).write_text(make())
