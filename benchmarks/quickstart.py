"""How well does the quick-start model draw what it is asked for?

Trains a small classifier on `shapes` (its accuracy on held-out images is stated), draws 256 images
of all classes from a run, and counts how many the classifier gives the class that was asked for.

    python benchmarks/quickstart.py [RUN]        default: outputs/quickstart
"""
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

from diffusion_model.dataset import create_dataset, create_loader
from diffusion_model.generation import generate, load_denoiser
from diffusion_model.transforms import to_float


def block(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.GroupNorm(8, o), nn.SiLU())


def classifier(sets, size, steps=500):
    "A small convolutional classifier, trained on the training images with a little noise."
    torch.manual_seed(0)
    net = nn.Sequential(block(3, 32), block(32, 64), block(64, 128), nn.Flatten(),
                        nn.Linear(128*(size//8)**2, len(sets.classes)))
    adam = torch.optim.AdamW(net.parameters(), 2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, steps)
    for batch, _ in zip(create_loader(sets.train, 128, seed=1), range(steps)):
        x = batch.images + 0.05*torch.randn_like(batch.images)
        F.cross_entropy(net(x), batch.cond).backward()
        adam.step(), rate.step(), adam.zero_grad()
    return net.eval()


@torch.no_grad()
def main(run="outputs/quickstart", n=256):
    denoiser = load_denoiser(run)
    sets = create_dataset(denoiser.config.data)
    with torch.enable_grad(): judge = classifier(sets, denoiser.config.data.image_size)
    x, y, _ = sets.test.batch(torch.arange(4000), torch.arange(4000))
    print(f"classifier on 4,000 held-out images: {(judge(x).argmax(1) == y).float().mean():.2%}")
    y = torch.arange(n) % denoiser.num_classes
    start = time.perf_counter()
    images = torch.cat([drawn.images for drawn in generate(denoiser, n, y, seed=1)])
    seconds = time.perf_counter() - start
    right = judge(to_float(images)).argmax(1) == y
    print(f"of {n} generated images, given the class they were asked for: "
          f"{right.float().mean():.2%} "
          f"({seconds:.0f} s for all)")
    for k, name in enumerate(sets.classes): print(f"  {name:10} {right[y == k].float().mean():.0%}")


if __name__ == "__main__": main(*sys.argv[1:])
