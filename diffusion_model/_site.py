"""How nbdev writes the pages of the site; written by hand, and loaded by nothing else.

The source of a lesson stands on its page in full. So an entry of the reference is a heading to link
to, with the way to the source, and stands above its cell. [tool.nbdev] in pyproject.toml names the
classes.
"""
import re

from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor
from nbdev.showdoc import BasicMarkdownRenderer


class Entry(BasicMarkdownRenderer):
    "A heading, and the way to the source where the project's home is known."
    def _repr_markdown_(self):
        heading = f"{'#'*self.title_level} {self.nm}"
        link = NbdevLookup().code(self.fn) or ""
        if not link.startswith("http"): return heading
        return f"{heading}\n\n[source]({link}){{.source-link}}"

    __repr__ = __str__ = _repr_markdown_


class EntriesFirst(Processor):
    "Entries stand above the cell that they speak of, in the order of its definitions."
    def begin(self):
        ordered, start = [], 0
        for cell in self.nb.cells:  # nbdev puts each below the cell, and before the one before
            if getattr(cell, "has_sd", False): ordered.insert(start, cell)
            else:
                ordered.append(cell)
                start = len(ordered) - ("exports" in getattr(cell, "directives_", {}))
        self.nb.cells[:] = ordered


class Links(Processor):
    "Links lead somewhere: not to entries that no page has, nor out of the site's folder."
    def cell(self, cell):
        if cell.cell_type != "markdown": return
        text = re.sub(r"\[([^\]]*)\]\([^)\s]*#_[^)\s]*\)", r"\1", cell.source)  # private names
        home = get_config().git_url
        beside = rf"[\1]({home}/blob/main/\2)" if home else r"\1"
        cell.source = re.sub(r"\[([^\]]*)\]\((?:\.\./)+([A-Z]\w*\.md)\)", beside, text)
