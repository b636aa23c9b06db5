"The first screen says what the models' cards and the records say, and shows the models there are."
import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image

import front
import gallery
import pages
from diffusion_model.config import list_models

FOUND = front.cards(pages.ROOT)


def rows_of(text, first):
    "The cells of the rows that begin so."
    return [line.strip("| ").split(" | ") for line in text.splitlines()
            if line.startswith(f"| {first} |")]


# The page
def test_one_cell_is_made_of_the_cards():
    made = [c for c in pages.cells(pages.ROOT/"nbs"/"index.ipynb")
            if pages.source(c).startswith(front.MARK)]
    assert len(made) == 1 and pages.source(made[0]) == front.text(pages.ROOT)


@pytest.mark.parametrize("name", list_models())
def test_the_readme_says_what_the_card_says(name):
    readme, card = (pages.ROOT/"README.md").read_text(), FOUND[name]
    row, took = rows_of(readme, f"`{name}`")
    eyes = [key for key in card["figures"] if key.startswith("fd/")]
    shown = [card["figures"][key] for key in eyes if not key.endswith("/pixels")][:2] or \
        [card["figures"]["fd/pixels"]]
    for cell, found in zip(row[1:3], shown):
        value, floor = map(float, re.match(r"([\d.]+) \((-?[\d.e-]+)\)", cell).groups())
        assert value == pytest.approx(found["value"], rel=6e-3)
        assert floor == pytest.approx(found["floor"], rel=6e-2)
    assert took[2] == card["drawing"] and took[-1] == f"`{card['command']}`"
    assert f"\n{front.draw(name, card)}\n" in readme


def test_the_page_has_every_model():
    assert set(FOUND) == set(list_models())


# Cards that are otherwise
FIGURE = {"value": 0.98765, "floor": 0.012345, "better": "lower"}
CARD = {"figures": {"fd/x-a": FIGURE, "fd/x-b": FIGURE | {"value": 1234.5}, "fd/pixels": FIGURE,
                    "accuracy/x-a": FIGURE | {"value": 0.941, "floor": None}},
        "bytes": 3_170_000, "minutes": 34.6, "device": "cpu, 1 thread", "prompts": [],
        "command": "diffusion-train --config x", "drawing": "5.5 s of one CPU core",
        "judged": "2,000 images of seed 0 (ddim, 20 steps, guidance 3) beside 10,000 of test"}


def test_figures_beside_their_floors():
    assert rows_of(front.quality({"x": CARD}), "`x`") == [[
        "`x`", "0.988 (0.012)", "1,234 (0.012)", "94%", "–", "–",
        "`diffusion-evaluate --checkpoint x --num_samples 2000`"]]
    assert rows_of(front.times({"x": CARD}), "`x`") == [[
        "`x`", "3.2 MB", "5.5 s of one CPU core", "35 min (cpu, 1 thread)",
        "`diffusion-train --config x`"]]


def test_an_eye_that_is_not_a_or_b_is_named():
    card = CARD | {"figures": {"fd/pixels": FIGURE}}
    assert rows_of(front.quality({"x": card}), "`x`")[0][1:6] == [
        "0.988 (0.012), pixels", "–", "–", "–", "–"]


def test_a_model_that_reads_is_asked_by_its_first_prompt(tmp_path):
    folder = tmp_path/"diffusion_model"/"models"/"x"
    folder.mkdir(parents=True)
    said = yaml.safe_dump(CARD | {"prompts": ["a red robot", "a moon"]})
    (folder/"README.md").write_text(f"---\n{said}---\n# x\n")
    text = front.text(tmp_path)
    assert "```sh\ndiffusion-sample --checkpoint x --prompt 'a red robot'\n```\n" in text
    assert "(images/models.png)" in text and "below the other: x; beside those of x stands" in text
    assert text.startswith(front.MARK + "\n") and "diffusers" not in text


# Records of speed
def row(name, *rounds, **more):
    return {"name": name, "seconds": sorted(rounds)[len(rounds)//2], "rounds": rounds,
            "parameters": 35_750_000} | more


def test_ratios_are_those_of_the_record(tmp_path):
    machine = {"gpu": None, "cpu": "A processor", "threads": 2, "versions": {"diffusers": "1.2"}}
    rows = [row("diffusers, as shipped", 4, 8, 4), row("diffusers, bf16", 2, 4, 2),
            row("smalldiffusion", .1, .1, .1), row("ours, fp32", 3, 3, 3),
            row("ours, automatic", 1.6, 3.2, 1.6), {"name": "diffusers, bf16, channels last",
                                                    "failed": "no memory"}]
    preset = [row("diffusers, as shipped", 10, 10, 10),
              row("preset fashion_mnist", 2, 2, 2, parameters=1_860_000)]
    lonely = [row("ours, automatic", 1, 1, 1)]
    (tmp_path/"train.json").write_text(json.dumps({"machine": machine, "sizes": {
        "cifar": {"batch": 16, "rows": rows}, "preset": {"batch": 64, "rows": preset},
        "small": {"batch": 64, "rows": lonely}}}))
    (tmp_path/"sample.json").write_text(json.dumps({"machine": machine, "sizes": {
        "cifar, 1": {"batch": 1, "rows": rows[:1] + rows[4:]}}}))
    tables = front.speed({"x": CARD}, tmp_path)
    own, beside = tables.split("\n\n")
    assert own == front.times({"x": CARD}) == front.speed({"x": CARD}, tmp_path/"none")
    head, _, *rows = beside.splitlines()
    assert head == "| on A processor, 2 threads, diffusers 1.2 | how fast | by |"
    assert [line.strip("| ").split(" | ") for line in rows] == [
        ["a training step, 16 images, 35.75 M parameters",
         "2.50 × diffusers as shipped, 1.25 × at its best", "`make bench`"],
        ["a training step, 64 images, 1.86 M parameters (the preset with a patch stem)",
         "5.00 × diffusers as shipped", "`make bench`"],
        ["a step of drawing, 1 image, 35.75 M parameters", "2.50 × diffusers as shipped",
         "`make bench`"]]


# The picture
def test_the_picture_is_of_the_models_that_are_shipped():
    with Image.open(gallery.FILE) as image:
        noted, width = json.loads(image.text["models"]), image.width
    shipped = {name: gallery.weights(folder) for name, folder in list_models().items()}
    assert noted == shipped, "a model is new or another: `make gallery`"
    assert width == gallery.WIDTH and gallery.FILE.stat().st_size < 80_000


def test_a_row_shows_every_image():
    images = np.random.default_rng(0).integers(0, 256, (11, 3, 32, 32), dtype=np.uint8)
    drawn = np.asarray(gallery.strip("x", images))
    wide = (gallery.WIDTH - gallery.NAME)//gallery.COLUMNS
    for i, image in enumerate(images):
        left = gallery.NAME + i % gallery.COLUMNS*wide
        top = gallery.GAP + i//gallery.COLUMNS*(gallery.CELL + gallery.GAP)
        cell = drawn[top:top + gallery.CELL, left:left + gallery.CELL]
        assert (cell[::4, ::4] == image.transpose(1, 2, 0)).all()
        assert (cell[3::4, 3::4] == cell[::4, ::4]).all()


def test_a_prompt_stands_beside_its_image():
    images = np.zeros((4, 1, 32, 32), np.uint8)
    with_words = np.asarray(gallery.strip("x", images, ["a red robot with a heart", "a moon"]))
    without = np.asarray(gallery.strip("x", images, [" "]*4))
    wide = (gallery.WIDTH - gallery.NAME)//gallery.PROMPTED
    for i in range(4):
        left, top = gallery.NAME + i % 3*wide, gallery.GAP + i//3*(gallery.LARGE + gallery.GAP)
        beside = np.s_[top:top + gallery.LARGE, left + gallery.LARGE:left + wide]
        assert (without[beside] == 255).all() and (with_words[beside] < 128).any()
    changed = (with_words != without).any(2)
    for i in range(4):  # and nothing else is written
        left, top = gallery.NAME + i % 3*wide, gallery.GAP + i//3*(gallery.LARGE + gallery.GAP)
        changed[top:top + gallery.LARGE, left + gallery.LARGE:left + wide] = False
    assert not changed.any(), "words reach over an image, or off the page"


def test_strips_are_stacked_in_few_colours():
    strips = [gallery.strip(name, np.full((1, 3, 32, 32), 90, np.uint8)) for name in "ab"]
    page = gallery.stacked(strips)
    assert page.size == (gallery.WIDTH, 2*strips[0].height) and page.mode == "P"
