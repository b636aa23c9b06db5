"""Which pictures does ten minutes of one processor core buy, here and beside other libraries?

Each variant trains on Fashion-MNIST for as many seconds of the processor (of one thread, everything
included), then draws 2,000 images, 200 of each class where it knows classes. All are judged alike,
by `diffusion-evaluate`: FD through our two feature networks, beside the floor that real images get.
One command each:

    python benchmarks/quality.py --root DATA --out DIR                  # the shipped config
    python benchmarks/quality.py --root DATA --out DIR --peers          # and other libraries
    python benchmarks/quality.py --root DATA --out DIR --study          # what paid, one change each

Peers are given their data from memory; no loader of theirs costs them time. Of each there are two:
as its makers ship it (its script's or its defaults' loss, rate and solver; images flipped at
random; diffusers in a network small enough for this time), and the best we found for it: labels,
guidance, no flips, a falling rate, an average that fits the length, bfloat16, for smalldiffusion a
smaller network. Nothing of theirs that only costs is kept (no logging).

A variant takes the seconds that it trains and some minutes to draw; --only names some of them, and
what lies in DIR already is judged again, and not made again.
"""
import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from judge import judge

EYES = ("fmnist-a", "fmnist-b")
CLASSES, SIZE = 10, 32


# -- in a variant's own process; each imports what it needs, and nothing of the others
class Clock:
    "Seconds of the processor since it was made, as a share of those there are."
    def __init__(self, seconds: float): self.seconds, self.begin = seconds, time.process_time()
    def used(self) -> float: return (time.process_time() - self.begin)/self.seconds


def cosine(share: float) -> float: return 0.5 + 0.5*math.cos(math.pi*min(1., share))
def constant(share: float) -> float: return 1.


def ours(root: str, seconds: float, samples: int, change: dict, out: Path) -> tuple:
    "The shipped config, changed, with as many steps as there is time for."
    import torch

    from diffusion_model.checkpoint import wait_for_checkpoints
    from diffusion_model.config import change_config, load_config
    from diffusion_model.dataset import create_dataset
    from diffusion_model.generation import generate, load_denoiser
    from diffusion_model.training import Trainer
    fields = {"data.root": root, "logging.progress": False, "output_dir": str(out)} | change
    cfg = load_config("fashion_mnist", fields)
    if not (out/"facts.json").exists():
        shutil.rmtree(out/"checkpoints", ignore_errors=True)  # of a run that was killed
        clock, data = Clock(seconds), create_dataset(cfg.data)

        def begun(steps):
            trainer = Trainer(change_config(cfg, {"max_steps": steps}), data, callbacks=[])
            trainer.check_precision()
            trainer.objective.train()
            return trainer, iter(trainer.loader)

        trainer, batches = begun(30)  # how long does a step take? What this costs is counted
        for _ in range(5): trainer.train_step(next(batches))
        begin = time.process_time()
        for _ in range(10): trainer.train_step(next(batches))
        pace = (time.process_time() - begin)/10
        trainer, batches = begun(max(1, round((1 - clock.used())*seconds/pace)))
        while trainer.step < trainer.cfg.training.max_steps and clock.used() < 1:
            trainer.train_step(next(batches))
        facts = {"steps": trainer.step, "batch": cfg.training.batch_size,
                 "seconds": clock.used()*seconds,
                 "parameters": sum(p.numel() for p in trainer.objective.parameters())}
        trainer.save()
        wait_for_checkpoints()
    else: facts = json.loads((out/"facts.json").read_text())  # drawn otherwise, from what is there
    drawn = generate(load_denoiser(out), samples, torch.arange(samples) % CLASSES, seed=1,
                     sampling=cfg.sampling)
    return torch.cat([d.images for d in drawn]), facts


class Peer(NamedTuple):
    "What a peer's variant needs of its library."
    network: Callable
    loss: Callable  # (images in [-1, 1], labels) -> a number
    draw: Callable  # (labels, scale of the guidance) -> images in [-1, 1]


def training_images(root: str, side: int) -> tuple:
    "All training images in [-1, 1], (N, 1, side, side), and their labels."
    import torch

    from diffusion_model.config import load_data_config
    from diffusion_model.dataset import create_dataset
    train = create_dataset(load_data_config("fashion_mnist", {"root": root, "image_size": side})
                           ).train
    found = [train.batch(at, at)[:2] for at in torch.arange(len(train)).split(2000)]
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])


def peer(root: str, seconds: float, samples: int, make, batch: int, lr: float, rate=constant,
         warmup: int = 0, average=lambda n: 0.99, low: bool = False, betas=(0.9, 0.999),
         decay: float = 0.01, flip: bool = True, side: int = SIZE, guidance: float = 1.) -> tuple:
    "Train what `make` gives. `average`: decay of the average, of the step; `low`: bfloat16."
    import torch

    from diffusion_model.pixels import to_uint8
    torch.manual_seed(0)
    images, labels = training_images(root, side)
    clock, theirs = Clock(seconds), make()
    layout = torch.channels_last if low else torch.contiguous_format
    network, steps = theirs.network.train().to(memory_format=layout), 0
    mean = torch.optim.swa_utils.AveragedModel(
        network, avg_fn=lambda old, new, n: old.lerp(new, 1 - average(n)), use_buffers=True)
    adam = torch.optim.AdamW(network.parameters(), lr, betas, weight_decay=decay)
    while clock.used() < 1:
        at = torch.randint(len(images), (batch,))
        x = images[at]
        if flip: x = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, x.flip(3), x)
        for group in adam.param_groups:
            group["lr"] = lr*min(1, (steps + 1)/max(1, warmup))*rate(clock.used())
        adam.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low): loss = theirs.loss(x, labels[at])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.)
        adam.step()
        mean.update_parameters(network)
        steps += 1
    trained = clock.used()*seconds
    network.load_state_dict(mean.module.state_dict())
    network.eval()
    wishes = torch.arange(samples) % CLASSES
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        drawn = torch.cat([theirs.draw(y, guidance).float() for y in wishes.split(100)])
    return to_uint8(drawn), {"steps": steps, "batch": batch, "seconds": trained,
                             "parameters": sum(p.numel() for p in network.parameters())}


def their_diffusers(schedule: str, predicts: str, solver: str, steps: int, null: bool) -> Peer:
    "`null`: is one label in ten hidden, as guidance needs it?"
    import diffusers
    import torch
    import torch.nn.functional as F
    network = diffusers.UNet2DModel(
        sample_size=SIZE, in_channels=1, out_channels=1, layers_per_block=1,
        block_out_channels=(32, 64, 64), norm_num_groups=8, num_class_embeds=CLASSES + null,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"))
    noises = diffusers.DDPMScheduler(1000, beta_schedule=schedule, prediction_type=predicts)

    def loss(x, y):
        if null: y = torch.where(torch.rand(len(y)) < 0.1, CLASSES, y)
        noise, t = torch.randn_like(x), torch.randint(1000, (len(x),))
        sought = noise if predicts == "epsilon" else noises.get_velocity(x, noise, t)
        return F.mse_loss(network(noises.add_noise(x, noise, t), t, y).sample.float(), sought)

    def answer(x, t, y, guidance):
        told = network(x, t, y).sample.float()
        if guidance == 1: return told
        untold = network(x, t, torch.full_like(y, CLASSES)).sample.float()
        return untold + guidance*(told - untold)

    def draw(y, guidance):
        more = {"clip_sample": True} if solver == "DDIMScheduler" else {}
        solve = getattr(diffusers, solver).from_config(noises.config, **more)
        solve.set_timesteps(steps)
        x = torch.randn(len(y), 1, SIZE, SIZE)
        for t in solve.timesteps: x = solve.step(answer(x, t, y, guidance), t, x).prev_sample
        return x
    return Peer(network, loss, draw)


def their_smalldiffusion(width: int, labels: bool) -> Peer:
    from smalldiffusion import Scaled, ScheduleLogLinear, Unet, samples
    from smalldiffusion.diffusion import generate_train_sample
    from smalldiffusion.model import CondEmbedderLabel
    told = {"cond_embed": CondEmbedderLabel(4*width, CLASSES)} if labels else {}
    network = Scaled(Unet)(28, 1, 1, ch=width, ch_mult=(1, 1, 2), attn_resolutions=(14,), **told)
    schedule = ScheduleLogLinear(sigma_min=0.01, sigma_max=20, N=800)

    def loss(x, y):
        x0, sigma, noise, cond = generate_train_sample((x, y), schedule, conditional=True)
        return network.get_loss(x0, sigma, noise, cond=cond if labels else None)

    def draw(y, guidance):
        *_, x = samples(network, schedule.sample_sigmas(20), gam=1.6, batchsize=len(y),
                        cfg_scale=guidance - 1, cond=y if labels else None)
        return x
    return Peer(network, loss, draw)


def their_denoising_diffusion_pytorch() -> Peer:
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    network = Unet(dim=32, dim_mults=(1, 2, 4), channels=1)
    noises = GaussianDiffusion(network, image_size=SIZE, timesteps=1000, sampling_timesteps=25)
    return Peer(network, lambda x, y: noises((x + 1)/2),
                lambda y, guidance: 2*noises.sample(batch_size=len(y)) - 1)


def their_guided_diffusion() -> Peer:
    "denoising-diffusion-pytorch with labels."
    from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet
    network = Unet(dim=32, num_classes=CLASSES, dim_mults=(1, 2, 4), channels=1,
                   cond_drop_prob=0.1)
    noises = GaussianDiffusion(network, image_size=SIZE, timesteps=1000, sampling_timesteps=25,
                               objective="pred_v", ddim_sampling_eta=0.)

    def draw(y, guidance): return 2*noises.sample(y, cond_scale=guidance, rescaled_phi=0.) - 1
    return Peer(network, lambda x, y: noises((x + 1)/2, classes=y), draw)


def growing(most: float): return lambda n: min(most, (1 + n)/(10 + n))


DIFFUSERS = dict(batch=64, lr=1e-4, rate=cosine, warmup=50, betas=(0.95, 0.999), decay=1e-6)
BEST = dict(batch=32, lr=1e-3, rate=cosine, warmup=50, low=True, flip=False, guidance=2.)
PEERS = {  # name -> (what makes it, how it is trained)
    "diffusers, its recipe": (
        partial(their_diffusers, "linear", "epsilon", "DDIMScheduler", 50, False),
        DIFFUSERS | dict(average=lambda n: min(0.9999, max(0., 1 - (1 + n)**-0.75)))),
    "diffusers, its best": (
        partial(their_diffusers, "squaredcos_cap_v2", "v_prediction",
                "DPMSolverMultistepScheduler", 20, True), BEST),
    "smalldiffusion, its script": (
        partial(their_smalldiffusion, 64, False),
        dict(batch=64, lr=7e-4, average=growing(0.999), side=28)),
    "smalldiffusion, its best": (
        partial(their_smalldiffusion, 32, True), BEST | dict(side=28, guidance=3.)),
    "denoising-diffusion-pytorch, its defaults": (their_denoising_diffusion_pytorch, dict(
        batch=32, lr=8e-5, betas=(0.9, 0.99), average=growing(0.995))),
    "denoising-diffusion-pytorch, its best": (their_guided_diffusion, BEST),
}

OURS = "the shipped config"
STUDY = {  # name -> what is changed of the shipped config, one choice each
    "prediction: the velocity": {"diffusion.prediction": "flow",
                                 "diffusion.loss_weighting": "uniform"},
    "prediction: the noise": {"diffusion.prediction": "eps", "diffusion.schedule": "cosine",
                              "diffusion.loss_weighting": "uniform"},
    "prediction: EDM's": {"diffusion.prediction": "edm", "diffusion.loss_weighting": "edm"},
    "schedule: cosine": {"diffusion.schedule": "cosine"},
    "weighting: none": {"diffusion.loss_weighting": "uniform"},
    "times: logit-normal": {"diffusion.timestep_sampling": "logit_normal"},
    "stem: patches of 4": {"model.patch_size": 4, "model.channel_multipliers": [3, 4]},
    "stem: none": {"model.patch_size": 1, "model.channel_multipliers": [1, 1, 2, 3]},
    "network: a transformer": {
        "model.name": "dit", "model.patch_size": 4, "model.width": 192, "model.depth": 6,
        "model.heads": 4},
    "width: half as much again": {"model.base_channels": 48},
    "width: 64, levels [1, 2, 2]": {
        "model.base_channels": 64, "model.channel_multipliers": [1, 2, 2],
        "model.attention_resolutions": [8], "model.norm_groups": 16},
    "depth: two blocks a level": {"model.num_res_blocks": 2},
    "time: scales and shifts": {"model.adaptive_norm": True},
    "batch: 32": {"training.batch_size": 32},
    "batch: 128": {"training.batch_size": 128},
    "rate: 1e-3": {"training.learning_rate": 1e-3},
    "rate: 4e-3": {"training.learning_rate": 4e-3},
    "rate: constant": {"training.lr_schedule": "constant"},
    "optimizer: AdamW": {"training.optimizer": "adamw", "training.learning_rate": 1e-3},
    "average: 0.98": {"training.ema_decay": 0.98},
    "average: 0.999": {"training.ema_decay": 0.999},
    "precision: float32": {"training.precision": "fp32"},
    "data: flipped at random": {"data.horizontal_flip": True},
    "data: 28 pixels": {"data.image_size": 28, "model.channel_multipliers": [1, 2],
                        "model.attention_resolutions": [7]},
    "guidance: none": {"sampling.guidance_scale": 1.},
    "guidance: 2": {"sampling.guidance_scale": 2.},
    "guidance: 3": {"sampling.guidance_scale": 3.},
    "solver: DDIM, 50 steps": {"sampling.solver": "ddim", "sampling.steps": 50},
    "solver: Heun, 10 steps": {"sampling.solver": "heun", "sampling.steps": 10},
    "solver: 10 steps": {"sampling.steps": 10},
    "solver: 40 steps": {"sampling.steps": 40},
}


def variant(name: str, args) -> tuple:
    "Images of a variant, uint8 (N, 1, side, side), and the facts of its training."
    import torch
    torch.set_num_threads(1)
    if name in PEERS:
        make, how = PEERS[name]
        return peer(args.root, args.seconds, args.samples, make, **how)
    return ours(args.root, args.seconds, args.samples, STUDY.get(name, {}),
                folder(args.out, OURS if only_drawn(name) else name))


def only_drawn(name: str) -> bool:
    "Is the network that of the shipped config, and only drawn from in another way?"
    return name in STUDY and all(field.startswith("sampling.") for field in STUDY[name])


# -- in the parent's process
def folder(out: Path, name: str) -> Path:
    return out/"".join(c if c.isalnum() else "_" for c in name)


def asked(name: str, args) -> list:
    "What a variant's samples depend on, apart from this file."
    from diffusion_model.config import load_config
    fields = {} if name in PEERS else load_config("fashion_mnist", STUDY.get(name, {})).model_dump()
    return json.loads(json.dumps([args.seconds, args.samples, fields]))


def made(name: str, args) -> Path:
    "Where a variant's samples lie; they are made if they are not there."
    here = folder(args.out, name)
    if only_drawn(name): made(OURS, args)
    if (here/"facts.json").exists():
        if json.loads((here/"facts.json").read_text())["asked"] != asked(name, args): sys.exit(
            f"{here}: was made with other --seconds or --samples, or with another config; remove "
            "it, or choose another --out")
    else:
        here.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, __file__, "--root", args.root, "--out", str(args.out),
                        "--seconds", str(args.seconds), "--samples", str(args.samples),
                        "--variant", name], check=True)
    return here


def make_one(args) -> None:
    "The work of a variant's process."
    images, facts = variant(args.variant, args)
    here = folder(args.out, args.variant)
    np.save(here/"samples.npy", images.numpy())
    (here/"facts.json").write_text(json.dumps(facts | {"asked": asked(args.variant, args)}))


def judged(here: Path, root: str) -> dict[str, dict]:
    "FD through each network, and how many times its floor."
    side = np.load(here/"samples.npy", mmap_mode="r").shape[-1]
    return judge(here, EYES, "--samples", str(here/"samples.npy"), "--config", "fashion_mnist",
                 "--data.root", root, "--image_size", str(side))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", required=True, help="where Fashion-MNIST lies (data.root)")
    parser.add_argument("--out", required=True, type=Path, help="samples, reports and the table")
    parser.add_argument("--seconds", type=float, default=600, help="of one core; default 600")
    parser.add_argument("--samples", type=int, default=2000, help="of each; default 2000")
    parser.add_argument("--peers", action="store_true", help="other libraries as well")
    parser.add_argument("--study", action="store_true", help="the shipped config, less each choice")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants whose names begin so")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.variant: return make_one(args)
    every = (OURS, *PEERS, *STUDY)
    names = [OURS, *(PEERS if args.peers else ()), *(STUDY if args.study else ())]
    if args.only: names = [name for name in every if name.startswith(tuple(args.only))]
    if not names: parser.error(f"--only: found {', '.join(args.only)}; allowed are beginnings of "
                               f"{'; '.join(every)}")
    rows = []
    for name in names:
        here = made(name, args)
        facts = json.loads((here/"facts.json").read_text())
        rows.append({"name": name, **facts, "fd": judged(here, args.root)})
        del rows[-1]["asked"]
        say(rows[-1])
        (args.out/"quality.json").write_text(json.dumps(rows, indent=1) + "\n")


def say(row: dict) -> None:
    fd = "  ".join(f"{name} {found['fd']:.3g} ({found['ratio']:.0f} ×)"
                   for name, found in row["fd"].items())
    print(f"{row['name']:<42}{row['parameters']/1e6:>6.2f} M {row['steps']:>6} steps of "
          f"{row['batch']:<4}{row['seconds']:>5.0f} s   FD {fd}", flush=True)


if __name__ == "__main__": main()
