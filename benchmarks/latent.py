"""Pixels or latents, for as much computing time?

Three trainings on images of 64×64 pixels: an autoencoder and a model in its latents, which share
the time, and a model on the pixels, which has all of it. Both models are U-Nets of one width; that
on pixels has the patch stem of our presets, so that it is no weak opponent. Time is the
processor's, of all threads, everything included: data, encoding, saving. Learning rates fall with
it. Each model's samples are judged by `diffusion-evaluate`: FD through two networks, beside the
floor that real images get; the autoencoder's reconstructions of held-out images by PSNR. What a
step costs is measured side by side.

    python benchmarks/latent.py --out DIR [--data shapes] [--seconds 1800] [--only PART ...]

DATA is shapes, or a folder of images. 1,800 seconds are a quarter of an hour of two cores; the
whole takes an hour and more. With --only, parts can run one after the other into the same folder:
autoencoder, latent, pixels, judge, cost.
"""
import argparse
import json
import math
import statistics
import time
from pathlib import Path

from judge import judge

from diffusion_model.callbacks import DECIDES, Callback, Log, SaveCheckpoints
from diffusion_model.config import load_config
from diffusion_model.training import Trainer

PARTS = ("autoencoder", "latent", "pixels", "judge", "cost")
SHARE = 0.25  # of the time, that the autoencoder may have
EYES = {"shapes": ("shapes-a", "shapes-b")}  # of other data: those below
OTHER_EYES = ("imagenet", "pixels")

class Budget(Callback):
    "Ends a run when its processor time is used up; until then the rate falls with it."
    order = DECIDES

    def __init__(self, seconds: float, begin: float):
        self.seconds, self.started = seconds, begin

    def used(self) -> float: return (time.process_time() - self.started)/self.seconds

    def begin(self, trainer):
        t = trainer.cfg.training
        trainer.rate = lambda step: t.learning_rate*min(1, (step + 1)/t.warmup_steps)*(
            0.5 + 0.5*math.cos(math.pi*min(1, self.used())))

    def after_step(self, trainer, metrics): trainer.stop = self.used() >= 1


def described(part: str, data: str, out: Path):
    "The config of a training."
    change = {"output_dir": str(out/part), "data.if_changed": "accept"}
    if data != "shapes":
        change |= {"data.dataset": "folder", "data.root": data, "horizontal_flip": True}
        if part == "autoencoder": change["channel_multipliers"] = [1, 2]  # 16×16 places
        else: change |= {"num_classes": 0, "guidance_scale": 1.}
    if part == "latent": change["data.autoencoder"] = str(out/"autoencoder")
    if part == "latent" and data != "shapes": change |= {
        "channel_multipliers": [1, 2, 2], "attention_resolutions": [8, 4]}
    if part == "pixels": change |= {
        "data.space": "pixels", "data.autoencoder": None, "clip_x0": True, "model.patch_size": 2,
        "channel_multipliers": [1, 2, 2], "attention_resolutions": [8],
        "diffusion.prediction": "x0", "ema_decay": 0.999}
    return load_config("autoencoder" if part == "autoencoder" else "latent", change)


def train(part: str, data: str, seconds: float, out: Path) -> dict:
    "Train for so many seconds of the processor; what it came to."
    begin, wall = time.process_time(), time.perf_counter()
    cfg = described(part, data, out)
    budget = Budget(seconds, begin)
    trainer = Trainer(cfg, callbacks=[Log(cfg.logging.log_every), budget,
                                      SaveCheckpoints(cfg.logging.checkpoint_every)])
    ready = time.process_time() - begin
    trainer.fit()
    found = {"steps": trainer.step, "images": trainer.step*cfg.training.batch_size,
             "seconds": time.process_time() - begin, "before the first step": ready,
             "wall": time.perf_counter() - wall,
             "parameters": sum(p.numel() for p in trainer.objective.parameters())}
    with trainer.averaged() as objective:
        found |= objective.validate(trainer.datasets.validation, trainer.world)
    return found


def judged(part: str, data: str, samples: int, out: Path) -> dict:
    "FD through each network, and how many times its floor."
    among = [] if data == "shapes" else ["--reference", "train"]
    return judge(out/part, EYES.get(data, OTHER_EYES), "--checkpoint", str(out/part),
                 "--num_samples", str(samples), "--steps", "10", *among)


def cost(data: str, out: Path, rounds: int = 5) -> dict:
    "Seconds of a training step in pixels (with and without the stem) and in latents, in turn."
    plain = described("pixels", data, out)
    plain.model.patch_size, plain.model.attention_resolutions = 1, [16]
    configs = {"latents": described("latent", data, out), "pixels": described("pixels", data, out),
               "pixels, no stem": plain}
    trainers = {}
    for name, cfg in configs.items():
        cfg.logging.output_dir = str(out/"cost")
        trainers[name] = Trainer(cfg, callbacks=[])
        trainers[name].check_precision()
    times = {name: [] for name in trainers}
    for turn in range(rounds + 1):
        for name, trainer in trainers.items():
            batch = trainer.loader.at(turn)
            start = time.process_time()
            trainer.train_step(batch)
            if turn: times[name].append(time.process_time() - start)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return medians | {f"{name}, ratio": medians[name]/medians["latents"]
                      for name in ("pixels", "pixels, no stem")}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where runs go")
    parser.add_argument("--data", default="shapes", help="shapes (default), or a folder of images")
    parser.add_argument("--seconds", type=float, default=1800, help="of the processor, each")
    parser.add_argument("--samples", type=int, default=1000, help="that are judged; default 1000")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
                        help=f"of {', '.join(PARTS)}; default: all, in this order")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out/"figures.json"

    def note(name: str, found: dict):
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(known | {name: found}, indent=1))
        print(name, json.dumps(found), flush=True)

    for part in args.only:
        if part == "autoencoder": note(part, train(part, args.data, SHARE*args.seconds, args.out))
        elif part == "latent":
            used = json.loads(file.read_text())["autoencoder"]["seconds"]
            note(part, train(part, args.data, args.seconds - used, args.out))
        elif part == "pixels": note(part, train(part, args.data, args.seconds, args.out))
        elif part == "cost": note(part, cost(args.data, args.out))
        else:
            for model in ("latent", "pixels"):
                note(f"FD, {model}", judged(model, args.data, args.samples, args.out))


if __name__ == "__main__": main()
