"""The first screen: pictures of the models that come with the package, how good and how fast.

Its text stands in nbs/index.ipynb, in the cell that begins with MARK, and `make readme`
(tests/pages.py) writes it: a model's figures from its card (diffusion_model/models/NAME/README.md),
and how fast we are beside diffusers from what was recorded on a machine that did nothing else:

    python benchmarks/train.py --peers --json benchmarks/measured/train.json
    python benchmarks/sample.py --peers --json benchmarks/measured/sample.json

Where there is no record there are no rows. The picture is made by tests/gallery.py (`make gallery`
does it all).
"""
import json, shlex, statistics
from pathlib import Path

import yaml

MARK = "<!-- Made of the models' cards by tests/front.py: `make readme` -->"
OURS = ("ours, automatic", "preset fashion_mnist")  # rows of a record: the first that is there
WORK = {"train": "a training step", "sample": "a step of drawing"}

TEXT = """{mark}

## What it draws

![{alt}](images/models.png)

These models come with the package:

```sh
{draw}
```

How good are they? FD is the distance from real images, seen through two networks, A and B; in
brackets **the floor**, which is what other real images get.

{quality}

How fast? `make bench` measures other libraries beside ours, [Speed](tutorials/speed.ipynb) each
lever.

{speed}"""


def read_card(folder: Path) -> dict:
    "The facts of a card."
    return yaml.safe_load((folder/"README.md").read_text("utf-8").split("---\n")[1])


def counted(n: int, word: str) -> str: return f"{n} {word}" + "s"*(n != 1)


def cards(root: Path) -> dict[str, dict]:
    "The facts of each model's card."
    found = sorted((root/"diffusion_model"/"models").glob("*/README.md"))
    return {p.parent.name: read_card(p.parent) for p in found}


def table(head: str, rows: list[list[str]]) -> str:
    "Markdown; all columns but the first and the last are numbers."
    names = head.split(" | ")
    lines = ["| " + " | ".join(cells) + " |" for cells in (names, *rows)]
    return "\n".join([lines[0], "|---|" + "--:|"*(len(names) - 2) + "---|", *lines[1:]])


# -- how good
def eyes(card: dict) -> list[str]:
    "What its FD was measured through: networks; pixels only where there is nothing else."
    found = [name.removeprefix("fd/") for name in card["figures"] if name.startswith("fd/")]
    return ([eye for eye in found if eye != "pixels"] or found)[:2]


def digits(x: float, n: int) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.{n}g}"


def distance(card: dict, which: int) -> str:
    "FD and its floor, through the first or second eye; one that is not A or B is named."
    for eye in eyes(card)[which:which + 1]:
        found = card["figures"][f"fd/{eye}"]
        named = "" if eye[-2:] in ("-a", "-b") else f", {eye}"
        return f"{digits(found['value'], 3)} ({digits(found['floor'], 2)}){named}"
    return "–"


def figure(card: dict, metric: str, form: str = ".2f") -> str:
    "Another figure and its floor, through the first eye."
    found = card["figures"].get(f"{metric}/{eyes(card)[0]}")
    if not found: return "–"
    floor = "" if found["floor"] is None else f" ({found['floor']:{form}})"
    return f"{found['value']:{form}}{floor}"


def quality(found: dict[str, dict]) -> str:
    head = "model | FD, A | FD, B | class right | precision | recall | judged by"
    count = {name: c["judged"].split()[0].replace(",", "") for name, c in found.items()}
    rows = [[f"`{name}`", distance(c, 0), distance(c, 1), figure(c, "accuracy", ".0%"),
             figure(c, "precision"), figure(c, "recall"),
             f"`diffusion-evaluate --checkpoint {name} --num_samples {count[name]}`"]
            for name, c in found.items()]
    return table(head, rows)


# -- how fast
def draw(name: str, card: dict) -> str:
    "The command."
    asked = f" --prompt {shlex.quote(card['prompts'][0])}" if card["prompts"] else ""
    return f"diffusion-sample --checkpoint {name}{asked}"


def times(found: dict[str, dict]) -> str:
    "What each model took, as its card says."
    rows = [[f"`{name}`", f"{c['bytes']/1e6:.1f} MB", c["drawing"],
             f"{c['minutes']:.0f} min ({c['device']})", f"`{c['command']}`"]
            for name, c in found.items()]
    return table("model | size | 64 images | learned in | by", rows)


def ratio(a: dict, b: dict) -> float:
    "How many times as fast is a as b: the median of the rounds."
    return statistics.median(y/x for x, y in zip(a["rounds"], b["rounds"], strict=True))


def record(folder: Path, kind: str) -> tuple[list[list[str]], str]:
    "The rows of benchmarks/KIND.py's JSON, and where it was measured; nothing where it is missing."
    if not (path := folder/f"{kind}.json").is_file(): return [], ""
    said, rows = json.loads(path.read_text()), []
    for size in said["sizes"].values():
        named = {row["name"]: row for row in size["rows"] if not row.get("failed")}
        theirs = [row for name, row in named.items() if name.startswith("diffusers")]
        ours = next((named[name] for name in OURS if name in named), None)
        shipped = named.get("diffusers, as shipped")
        if not ours or not shipped: continue
        best = min(theirs, key=lambda row: row["seconds"])
        more = "" if best is shipped else f", {ratio(ours, best):.2f} × at its best"
        preset = " (the preset with a patch stem)" if ours["name"] == OURS[1] else ""
        many = counted(size["batch"], "image")
        rows.append([f"{WORK[kind]}, {many}, {ours['parameters']/1e6:.2f} M parameters{preset}",
                     f"{ratio(ours, shipped):.2f} × diffusers as shipped{more}", "`make bench`"])
    m = said["machine"]
    threads = counted(m["threads"], "thread")
    return rows, f"{m['gpu'] or m['cpu']}, {threads}, diffusers {m['versions']['diffusers']}"


def speed(found: dict[str, dict], measured: Path) -> str:
    "The tables: what the models took, and what was recorded beside diffusers."
    rows, places = [], []
    for kind in WORK:
        more, where = record(measured, kind)
        rows += more
        if where and where not in places: places.append(where)
    if not rows: return times(found)
    return times(found) + "\n\n" + table(f"on {'; '.join(places)} | how fast | by", rows)


def text(root: Path) -> str:
    "The cell."
    found = cards(root)
    alt = "Pictures that the models drew, one model below the other: " + ", ".join(found)
    if read := [name for name, card in found.items() if card["prompts"]]:
        alt += f"; beside those of {', '.join(read)} stands the prompt"
    commands = "\n".join(draw(name, card) for name, card in found.items())
    return TEXT.format(mark=MARK, alt=alt, draw=commands, quality=quality(found),
                       speed=speed(found, root/"benchmarks"/"measured"))
