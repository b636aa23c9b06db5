"""Does a model draw what it is asked for, where training has never drawn it?

Trains a small classifier on drawn avatars of all looks, with a little blur and noise, to see their
style, colour and feature; states how often it is right on drawn images that it has not seen. Then
draws 256 images from a run, of prompts that ask for combinations held out of the run's training,
and counts how many have the style, the colour and the feature that the prompt names.

    python benchmarks/avatars.py [RUN] [--steps 500]        default: outputs/avatars

RUN may also be the name of a model that comes with the package: avatars.

A few minutes on one core. Without a run it says how good the classifier is, and ends.
"""
import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur

from diffusion_model.avatars import PAINTS, STYLES, draw_avatars, looks
from diffusion_model.config import find_model
from diffusion_model.dataset import sample_indices
from diffusion_model.generation import generate, load_denoiser
from diffusion_model.transforms import to_float

FEATURES = [f for style in STYLES.values() for f in style.features]
NAMES = "style", "colour", "feature"
SIZES = len(STYLES), len(PAINTS), len(FEATURES)
DRAWN, JUDGED = 7680, 256  # images that the classifier learns from; that are judged


def in_turn(among: list, n: int) -> list: return [among[i % len(among)] for i in range(n)]


def answers(shown: list) -> Tensor:  # int64 (N, 3)
    "Style, colour and feature of looks, as numbers."
    return torch.tensor([(list(STYLES).index(k.style), list(PAINTS).index(k.colour),
                          FEATURES.index(k.feature)) for k in shown])


def block(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.GroupNorm(8, o), nn.SiLU(),
                         nn.Conv2d(o, o, 3, 1, 1), nn.GroupNorm(8, o), nn.SiLU())


def disturbed(x: Tensor) -> Tensor:
    "Half of the batch blurred, all with noise: a classifier should not live on single pixels."
    half = len(x)//2
    x = torch.cat([gaussian_blur(x[:half], [3, 3], [0.6]), x[half:]])
    return x + 0.08*torch.rand(len(x), 1, 1, 1)*torch.randn_like(x)


def classifier(images: Tensor, right: Tensor, steps: int) -> nn.Module:  # (B, 3, H, W) -> (B, 43)
    "A small convolutional network with one answer for each of the three questions."
    torch.manual_seed(0)
    net = nn.Sequential(block(3, 24), block(24, 48), block(48, 64), nn.Flatten(), nn.Dropout(0.2),
                        nn.Linear(64*(images.shape[-1]//8)**2, sum(SIZES)))
    adam = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, 4e-3, steps)
    for positions in torch.arange(96*steps).split(96):
        at = sample_indices(positions, len(images), seed=1)
        said = net(disturbed(to_float(images[at]))).split(SIZES, 1)
        sum(F.cross_entropy(s, y) for s, y in zip(said, right[at].T)).backward()
        adam.step(), rate.step(), adam.zero_grad()
    return net.eval()


@torch.no_grad()
def seen_in(net: nn.Module, images: Tensor) -> Tensor:  # uint8 (N, 3, H, W) -> int64 (N, 3)
    parts = [net(to_float(x)).split(SIZES, 1) for x in images.split(256)]
    return torch.cat([torch.stack([p.argmax(1) for p in part], 1) for part in parts])


def shares(found: Tensor, right: Tensor) -> str:
    same = found == right
    parts = [*zip(NAMES, same.double().mean(0).tolist()), ("all", same.all(1).double().mean())]
    return ", ".join(f"{name} {share:.2%}" for name, share in parts)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, default=Path("outputs/avatars"),
                        help="a run, or a shipped model's name")
    parser.add_argument("--steps", type=int, default=500, help="of the classifier; default 500")
    args = parser.parse_args(argv)
    denoiser = load_denoiser(args.run) if find_model(args.run).exists() else None
    if denoiser and not denoiser.vocabulary: parser.error(
        f"{args.run}: was trained without captions; choose a run of --config avatars")
    size = denoiser.config.data.image_size if denoiser else 32
    unseen = looks(unseen=True)
    every, start = looks() + unseen, time.perf_counter()
    images = draw_avatars(1, torch.arange(DRAWN), size, every)
    net = classifier(images, answers(in_turn(every, DRAWN)), args.steps)
    print(f"a classifier, trained for {time.perf_counter() - start:.0f} s, is right in the")
    for what, among in (("all looks", every), ("those alone that runs never learn from", unseen)):
        found = seen_in(net, draw_avatars(2, torch.arange(5*len(every)), size, among))
        right = answers(in_turn(among, len(found)))
        print(f"  {shares(found, right)} of {len(right):,} new images of {what}")
    if denoiser is None: return print(f"no run in {args.run}: diffusion-train --config avatars")
    asked = in_turn(unseen, JUDGED)
    length = denoiser.config.data.caption_length
    words = torch.tensor([denoiser.vocabulary.encode(k.caption(), length) for k in asked])
    start = time.perf_counter()
    parts = generate(denoiser, len(asked), {"caption": words}, seed=1)
    drawn = torch.cat([part.images for part in parts])
    print(f"of {len(asked)} images drawn ({time.perf_counter() - start:.0f} s) of prompts never "
          f"seen: {shares(seen_in(net, drawn), answers(asked))}")


if __name__ == "__main__": main()
