"""Train the six classifiers whose features metrics look through, and write their weights.

    python tests/classifiers.py [--root DIR] [--only NAME ...] [--out DIR]

Two architectures (a and b of `diffusion_model.features`, with seeds 1 and 2) for each of three data
sets: shapes, Fashion-MNIST (fmnist) and MNIST. The last two are torchvision's, and are read from
DIR; shapes are drawn. Plain PyTorch: AdamW, batches of 128, a learning rate that rises and then
falls along a cosine; pictures are moved by up to two pixels, clothes also mirrored, shapes drawn
anew for each batch. Nothing is blurred, and no noise is added: the features should notice both.

After training, batch normalisation is folded into the convolutions and the weights are rounded to
16 bits. What is left *is* the network: its accuracy on the test set is measured after that, and
stands in the file with the seed and the classes. One thread, some 20 minutes for all six. The
same seed gives the same weights on the same machine; on another, sums may be rounded otherwise, and
the accuracies agree to a tenth of a percent or so. The hash of each file is printed last: where
you mean to ship it, write it into WEIGHTS of nbs/41_features.ipynb.
"""
import argparse
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import datasets
from tqdm import tqdm

from diffusion_model.counters import counter_uniform, permutation
from diffusion_model.dataset import Shapes
from diffusion_model.features import (ARCHITECTURES, Features, Prepare, classifier, fold,
                                      hash_file)

ROOT = Path(__file__).resolve().parent.parent
BATCH, SEEDS, VERSION = 128, {"a": 1, "b": 2}, 1


class Data(NamedTuple):
    dataset: str                 # as `data.dataset` names it
    channels: int
    classes: list[str]
    batch: Callable[[int, int], tuple[Tensor, Tensor]]  # (seed, step) -> floats in [0, 255], labels
    test: tuple[Tensor, Tensor]  # bytes (N, C, H, W), labels


def moved(x: Tensor, seed: int, positions: Tensor, mirror: bool, most: int = 2) -> Tensor:
    "Each picture moved by up to `most` pixels, black comes in; half of them mirrored, if wished."
    u = counter_uniform(seed, "augment", positions, 3)
    dy, dx = (u[:, :2]*(2*most + 1)).long().T
    size = torch.arange(x.shape[-1])
    rows, columns = size + dy[:, None], size + dx[:, None]
    if mirror: columns = torch.where(u[:, 2:] < 0.5, columns.flip(1), columns)
    x = F.pad(x, (most,)*4)
    return x[torch.arange(len(x))[:, None, None], :, rows[:, :, None], columns[:, None]].movedim(
        3, 1)


def drawn() -> Data:
    train, test = Shapes(split="train"), Shapes(10_000, split="test")
    def batch(seed, step): return train.read(step*BATCH + torch.arange(BATCH))
    return Data("shapes", 3, Shapes.classes, batch, test.read(torch.arange(10_000)))


def photographed(name: str, root: Path, mirror: bool) -> Data:
    make = getattr(datasets, name)
    train, test = (make(str(root), train=part) for part in (True, False))
    images = Prepare((32, 32), 1, 0., 1/255)(train.data[:, None])  # still in [0, 255]

    order = functools.cache(lambda seed, epoch: permutation(seed, epoch, len(images)))

    def batch(seed, step):
        epoch, k = divmod(step, len(images)//BATCH)
        at = order(seed, epoch)[k*BATCH:(k + 1)*BATCH]
        positions = step*BATCH + torch.arange(BATCH)
        return moved(images[at], seed, positions, mirror), train.targets[at]
    return Data(name, 1, train.classes, batch, (test.data[:, None], test.targets))


def data(name: str, root: Path) -> Data:
    if name == "shapes": return drawn()
    known = {"fmnist": ("FashionMNIST", True), "mnist": ("MNIST", False)}
    dataset, mirror = known[name]
    return photographed(dataset, root, mirror)


def rate(step: int, steps: int, peak: float = 4e-3) -> float:
    "The learning rate: up for a tenth of the steps, then down along a cosine."
    rise = steps//10
    if step < rise: return peak*(step + 1)/rise
    return peak*0.5*(1 + math.cos(math.pi*(step - rise)/(steps - rise)))


def train(network: nn.Module, data: Data, seed: int, steps: int, title: str) -> nn.Module:
    "The plain loop."
    prepare = Prepare((32, 32), data.channels, 0.5, 0.5)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    bar = tqdm(range(steps), desc=title, mininterval=5)
    for step in bar:
        for group in optimizer.param_groups: group["lr"] = rate(step, steps)
        images, labels = data.batch(seed, step)
        loss = F.cross_entropy(network.head(network(prepare(images))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0: bar.set_postfix(loss=f"{loss.item():.3f}")
    return fold(network)


def accuracy(features: Features, test: tuple[Tensor, Tensor]) -> float:
    images, labels = test
    return (features.classify(features(images)) == labels).double().mean().item()


def rounded(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.half().contiguous() for name, value in network.state_dict().items()}


def write(name: str, root: Path, out: Path, steps: int) -> str:
    "Train one, write its file, and say what it is worth."
    kind, letter = name.split("-")
    source, seed, began = data(kind, root), SEEDS[letter], time.perf_counter()
    torch.manual_seed(seed)
    network = ARCHITECTURES[letter](source.channels, len(source.classes))
    weights = rounded(train(network, source, seed, steps, name))
    took, path = time.perf_counter() - began, out/f"{name}.safetensors"
    about = {"version": VERSION, "dataset": source.dataset, "channels": source.channels,
             "classes": list(source.classes), "seed": seed, "steps": steps}
    # One entry of text: so the same weights are the same bytes.
    save_file(weights, path, {"about": json.dumps(about)})
    about["accuracy"] = accuracy(classifier(name, path, hash_file(path)), source.test)
    save_file(weights, path, {"about": json.dumps(about)})
    return (f'    "{name}": "{hash_file(path)}",  # {about["accuracy"]:.2%} of the test set, '
            f"{path.stat().st_size/1000:.0f} kB, {took:.0f} s")


STEPS = {"shapes-a": 600, "shapes-b": 400, "fmnist-a": 3500, "fmnist-b": 2800,
         "mnist-a": 2500, "mnist-b": 1800}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("data"), help="torchvision's data sets")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--out", type=Path, default=ROOT/"diffusion_model"/"weights")
    parser.add_argument("--steps", type=int, help="fewer or more than usual, to try something")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    lines = []
    for name in args.only:
        lines.append(write(name, args.root, args.out, args.steps or STEPS[name]))
        print(lines[-1], flush=True)


if __name__ == "__main__": main()
