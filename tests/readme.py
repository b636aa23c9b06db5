"README.md is `nbs/index.ipynb` as Markdown; `python tests/readme.py` writes it."
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def readme(
    root: Path = ROOT,  # the project's top folder
) -> str:  # the text of README.md
    "The index page as Markdown, its relative links made to work from the top folder."
    from nbconvert import MarkdownExporter
    text, _ = MarkdownExporter().from_filename(str(root/"nbs"/"index.ipynb"))
    relative = r"\]\((?!https?:|#|\.\./)"
    return re.sub(r"\]\(\.\./", "](", re.sub(relative, "](nbs/", text)).strip() + "\n"


if __name__ == "__main__": (ROOT/"README.md").write_text(readme())
