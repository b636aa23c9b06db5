"""Draw the picture of all models that come with the package: nbs/images/models.png.

    python tests/gallery.py                                   # `make gallery` does it
    python tests/gallery.py RUN --prompt "..." --out FILE     # of a run, before it is shipped

Each draws the first images of seed 0, as `diffusion-sample` does; one that reads draws the prompts
of its card, and they stand beside the pictures. The file notes the sha256 of each model's weights,
so that a test sees where a model was replaced and its row was not.
"""
import argparse
import json
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

import ship
from diffusion_model.checkpoint import load_checkpoint
from diffusion_model.config import list_models
from diffusion_model.generation import load_denoiser
from diffusion_model.plotting import image_grid

FILE = ship.ROOT/"nbs"/"images"/"models.png"
WIDTH, NAME, GAP = 1660, 280, 8  # pixels; shown at half of it
CELL, LARGE = 128, 192           # of an image in a row; of one with its prompt
COLUMNS, PROMPTED, MOST = 10, 3, 6  # images a row; with prompts; how many prompts


def weights(model: Path | str) -> str:
    "The sha256 of its weights."
    return load_checkpoint(model).files["model.safetensors"]["sha256"]


def enlarged(image, side: int) -> Image.Image:
    "Whole pixels where the side is a multiple."
    small = Image.fromarray(image_grid(image, pad=0))
    whole = side % small.width == 0 and side % small.height == 0
    return small.resize((side, side), Image.Resampling.NEAREST if whole else
                        Image.Resampling.BICUBIC)


def strip(name: str, images, prompts: list[str] = ()) -> Image.Image:  # images: uint8 (N, C, H, W)
    "The rows of a model: its name, and its images, each beside its prompt if there are any."
    side, columns = (LARGE, PROMPTED) if prompts else (CELL, COLUMNS)
    height = -(-len(images)//columns)*(side + GAP) + GAP
    page = Image.new("RGB", (WIDTH, height), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(28)
    pen.text((GAP, GAP + side//2), name, "black", ImageFont.load_default(32), anchor="lm")
    wide = (WIDTH - NAME)//columns
    for i, image in enumerate(images):
        left, top = NAME + i % columns*wide, GAP + i//columns*(side + GAP)
        page.paste(enlarged(image, side), (left, top))
        if not prompts: continue
        words = "\n".join(textwrap.wrap(prompts[i % len(prompts)], 17))
        pen.text((left + side + 2*GAP, top + side//2), words, "black", font, anchor="lm")
    return page


def stacked(strips: list[Image.Image]) -> Image.Image:
    "One below the other, in 256 colours."
    page = np.concatenate([np.asarray(strip) for strip in strips])
    return Image.fromarray(page).quantize(256, kmeans=1, dither=Image.Dither.NONE)


def main(argv: list[str] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="*", help="name or run; default: all that are shipped")
    parser.add_argument("--prompt", action="append", help="in place of its card's")
    parser.add_argument("--out", type=Path, default=FILE, help=f"default: {FILE.name}")
    args = parser.parse_args(argv)
    strips, noted, shipped = [], {}, list_models()
    if args.model and args.out == FILE: parser.error(
        f"--out: needed with {args.model[0]}, since {FILE.name} shows all that are shipped")
    for model in args.model or shipped:
        card = ship.read_card(shipped[model]) if model in shipped else {"prompts": []}
        prompts = (args.prompt or card["prompts"])[:MOST]
        images = ship.draw(load_denoiser(model), len(prompts) or COLUMNS, prompts)
        name = Path(model).name
        strips.append(strip(name, images, prompts))
        noted[name] = weights(model)
    info = PngImagePlugin.PngInfo()
    info.add_text("models", json.dumps(noted))
    stacked(strips).save(args.out, optimize=True, pnginfo=info)
    print(f"{args.out}: {', '.join(noted)}; {args.out.stat().st_size:,} bytes")


if __name__ == "__main__": main()
