"""What does the trainer cost beside the network?

`checkpoint`: how long a save holds training up, against `safetensors.torch.save_file` of the same tensors on the same disk, in
turn, medians. DDPM's network for CIFAR-10 (35.75 M parameters) after one step of Adam on random gradients, with its average and
its moments: 572 MB. Everything earlier is on the disk before each measurement. A minute on two cores.

    python benchmarks/trainer.py [checkpoint]        default: all parts; files go to a new folder here, and are deleted
"""
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffusion_model.checkpoint import load_checkpoint, save_checkpoint, wait_for_checkpoints
from diffusion_model.config import load_config
from diffusion_model.ema import EMA
from diffusion_model.optimizer import create_optimizer
from diffusion_model.unet import create_unet


def timed(call, *args, **kwargs):
    begin = time.perf_counter()
    call(*args, **kwargs)
    return time.perf_counter() - begin


def run():
    "Config, network, average and optimizer, after one step on random gradients."
    config = load_config("default")
    network = create_unet(config)
    ema, optimizer = EMA(network), create_optimizer(config.training, network)
    for p in network.parameters(): p.grad = torch.randn_like(p)
    optimizer.step()
    ema.update(0)
    return config, network, ema, optimizer


def row(name, values, base):
    m = statistics.median(values)
    print(f"{name:<42}{m:>7.3f} s {m/base:>6.2f} × save_file   ({min(values):.3f} to {max(values):.3f})", flush=True)


def checkpoint(folder, rounds=9):
    config, network, ema, optimizer = run()
    moments = optimizer.state_dict()["state"]
    states = {"model": network.state_dict(), "ema": ema.state_dict(),
              **{k: {str(i): s[k] for i, s in moments.items()} for k in ("exp_avg", "exp_avg_sq")}}
    tensors = {f"{part}.{k}": v for part, state in states.items() for k, v in state.items()}
    print(f"checkpoint: {sum(t.nbytes for t in tensors.values())/1e6:.0f} MB")
    target, times = folder/"one.safetensors", []
    for step in range(rounds + 1):
        bare = timed(save_file, tensors, target)
        with open(target, "r+b") as file: synced = bare + timed(os.fsync, file.fileno())
        target.unlink()
        held = timed(save_checkpoint, folder, step, network, ema, optimizer, config, keep=1)
        times.append((bare, synced, held, held + timed(wait_for_checkpoints)))
    names = "save_file", "save_file and fsync", "a save holds training up", "until all is on the disk, and hashed"
    columns = list(zip(*times[1:]))  # the first round warms up
    for name, values in zip(names, columns): row(name, values, statistics.median(columns[0]))
    opened = [timed(lambda: load_checkpoint(folder).model) for _ in range(3)]
    row("load: all verified, the weights read", opened, statistics.median(columns[0]))


if __name__ == "__main__":
    parts = {"checkpoint": checkpoint}
    for part in sys.argv[1:] or parts:
        if part not in parts: sys.exit(f"trainer: found '{part}'; known are {', '.join(parts)}")
        with tempfile.TemporaryDirectory(prefix="bench_", dir=".") as folder: parts[part](Path(folder))
