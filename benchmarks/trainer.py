"""What does the trainer cost beside the network?

`checkpoint`: how long a save holds training up, against `safetensors.torch.save_file` of the same
tensors on the same disk, in turn, medians. DDPM's network for CIFAR-10 (35.75 M parameters) after
one step of Adam on random gradients, with its average and its moments: 572 MB. Everything earlier
is on the disk before each measurement. A minute on two cores.

`overhead`: a step of `Trainer.fit` as the quick start trains (noise and times by counter, gradients
checked and clipped, metrics logged), against the bare sequence: a batch already there, random
noise, forward, backward, step, EMA. A step of each in turn, medians; with the training images in
memory, as most data sets are, and drawn on the way, as the quick start's are. Five minutes.

    python benchmarks/trainer.py [checkpoint] [overhead]    # default: both

Files go to a new folder here, and are deleted.
"""
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from diffusion_model.callbacks import Callback, Log
from diffusion_model.checkpoint import load_checkpoint, save_checkpoint, wait_for_checkpoints
from diffusion_model.config import load_config
from diffusion_model.dataset import ArraySource, ImageSet, create_dataset
from diffusion_model.denoiser import create_denoiser, diffusion_loss
from diffusion_model.ema import EMA
from diffusion_model.networks import create_network
from diffusion_model.optimizer import create_optimizer
from diffusion_model.training import Trainer


def timed(call, *args, **kwargs):
    begin = time.perf_counter()
    call(*args, **kwargs)
    return time.perf_counter() - begin


def run():
    "Config, network, average and optimizer, after one step on random gradients."
    config = load_config("default")
    network = create_network(config.model, (3, 32, 32))
    ema, optimizer = EMA(network), create_optimizer(config.training, network)
    for p in network.parameters(): p.grad = torch.randn_like(p)
    optimizer.step()
    ema.update(0)
    return config, network, ema, optimizer


def row(name, values, base):
    m = statistics.median(values)
    print(f"{name:<42}{m:>7.3f} s {m/base:>6.2f} × save_file   "
          f"({min(values):.3f} to {max(values):.3f})", flush=True)


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
    names = ("save_file", "save_file and fsync", "a save holds training up",
             "until all is on the disk, and hashed")
    columns = list(zip(*times[1:]))  # the first round warms up
    for name, values in zip(names, columns): row(name, values, statistics.median(columns[0]))
    opened = [timed(lambda: load_checkpoint(folder).model) for _ in range(3)]
    row("load: all verified, the weights read", opened, statistics.median(columns[0]))


class Bare(Callback):
    "After each step of the trainer, a bare step on a network of the same shape; both are timed."
    def begin(self, trainer):
        cfg = trainer.cfg
        last = cfg.training.channels_last
        layout = torch.channels_last if last else torch.contiguous_format
        self.network = create_network(cfg.model, (3, 32, 32)).to(memory_format=layout).train()
        self.denoiser = create_denoiser(cfg.diffusion, self.network)
        self.ema = EMA(self.network, cfg.training.ema_decay)
        self.optimizer = create_optimizer(cfg.training, self.network)
        self.batch, self.times, self.begun = trainer.loader.at(0), [], None

    def step(self, step):
        x0, y, _ = self.batch
        t = self.denoiser.schedule.sample_timesteps(torch.rand(len(x0)))
        loss = diffusion_loss(self.denoiser, x0, torch.randn_like(x0), t, y).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.ema.update(step)

    def after_step(self, trainer, metrics):
        took = self.begun and time.perf_counter() - self.begun
        bare = timed(self.step, trainer.step - 1)
        if took: self.times.append((took, bare))
        self.begun = time.perf_counter()


def overhead(folder, steps=400):
    cfg = load_config("quickstart", {"max_steps": steps, "progress": "false"})
    drawn = create_dataset(cfg.data)
    source = ArraySource(*drawn.train.source.read(torch.arange(5000)), drawn.classes)
    memory = drawn._replace(train=ImageSet(source, drawn.train.transform))
    for name, sets in (("in memory", memory), ("drawn", drawn)):
        bare, cfg.logging.output_dir = Bare(), str(folder/name)
        Trainer(cfg, sets, [Log(cfg.logging.log_every), bare]).fit()
        ours, base = (statistics.median(t) for t in zip(*bare.times[10:]))
        ratios = [a/b for a, b in bare.times[10:]]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"overhead, images {name}: a step of the trainer {ours*1e3:.1f} ms, "
              f"bare {base*1e3:.1f} ms: {ours/base:.3f}; "
              f"step by step {middle:.3f} (quartiles {low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    parts = {"checkpoint": checkpoint, "overhead": overhead}
    for part in sys.argv[1:] or parts:
        if part not in parts: sys.exit(f"trainer: found '{part}'; known are {', '.join(parts)}")
        with tempfile.TemporaryDirectory(prefix="bench_", dir=".") as folder:
            parts[part](Path(folder))
