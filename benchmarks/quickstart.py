"""How well does the quick-start model draw what it is asked for?

Draws 256 images of all classes from a run, and counts how many the classifier that comes with the
data (shapes-a; its accuracy on held-out images is stated) gives the class that was asked for.

    python benchmarks/quickstart.py [RUN]        default: outputs/quickstart
"""
import argparse
import time

import torch

from diffusion_model.dataset import create_dataset
from diffusion_model.features import create_features
from diffusion_model.generation import generate, load_denoiser
from diffusion_model.pixels import to_uint8

IMAGES, HELD_OUT = 256, 4000


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", default="outputs/quickstart", help="or a model's name")
    args = parser.parse_args(argv)
    denoiser, eye = load_denoiser(args.run), create_features("shapes-a")
    if denoiser.classes != eye.classes: parser.error(
        f"{args.run}: found classes {denoiser.classes}; allowed: {eye.classes}")
    held = create_dataset(denoiser.config.data).test.batch(torch.arange(HELD_OUT))
    right = eye.classify(eye(to_uint8(held.images))) == held.cond
    print(f"classifier on {HELD_OUT:,} held-out images: {right.float().mean():.2%}")
    y, start = torch.arange(IMAGES) % denoiser.num_classes, time.perf_counter()
    images = torch.cat([drawn.images for drawn in generate(denoiser, IMAGES, y, seed=1)])
    seconds = time.perf_counter() - start
    right = eye.classify(eye(images)) == y
    print(f"of {IMAGES} generated images, given the class they were asked for: "
          f"{right.float().mean():.2%} ({seconds:.0f} s for all)")
    for k, name in enumerate(eye.classes): print(f"  {name:10} {right[y == k].float().mean():.0%}")


if __name__ == "__main__": main()
