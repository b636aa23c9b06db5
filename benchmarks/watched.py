"""What does the quick start draw while it learns, with raw weights and with averaged ones?

Trains the quick start's config, stops at four steps (the last is the config's), and draws the same
labels from the same noise twice at each: with the raw weights and with the averaged ones. Makes the
pictures of two lessons, training.png (31, with the training images nearest to the last samples, of
those that the run has seen) and ema.png (26), and watched.json, whose figures are: validation loss,
FD (features shapes-a, against as many held-out images; compare only figures of one number of
samples), how far raw and averaged samples are apart, and how near to training images the last
samples are, beside held-out images. Distances are the root of the mean squared difference of the
pixels, in grey levels of 0 to 255. It takes about five minutes on two cores.

    python benchmarks/watched.py                        # all into outputs/watched
    python benchmarks/watched.py --pictures nbs/images  # the lessons' own: `make watched`
    python benchmarks/watched.py --steps 60             # a trial of a minute, which draws blurs
"""
import argparse
import json
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from diffusion_model.callbacks import Callback
from diffusion_model.config import load_config
from diffusion_model.dataset import sample_indices
from diffusion_model.evaluation import fd, nearest
from diffusion_model.features import create_features
from diffusion_model.generation import generate
from diffusion_model.pixels import to_uint8
from diffusion_model.plotting import image_grid
from diffusion_model.training import Trainer
from diffusion_model.transforms import to_float

matplotlib.use("Agg")
SHARES = (100/1300, 300/1300, 1000/1300, 1.)  # of the run: at these steps it is watched
SHOWN = torch.tensor([1, 3, 4, 5, 6, 7])      # these samples, and those 8 after them: the classes
ENLARGED = 3                                  # pixels of a picture for each of a sample


class Watch(Callback):
    "At each watched step, samples and validation loss of both kinds of weights."
    def __init__(self, steps: list, samples: int):
        self.steps, self.samples, self.drawn, self.figures = steps, samples, {}, {}

    def after_step(self, trainer, metrics):
        if trainer.step % 50 == 0: print(f"step {trainer.step}  loss {metrics['loss']:.4f}")
        if trainer.step not in self.steps: return
        trainer.objective.eval()
        raw = self.look(trainer, trainer.objective)
        trainer.objective.train()
        with trainer.averaged() as objective: averaged = self.look(trainer, objective)
        self.drawn[trainer.step] = {"raw": raw[0], "averaged": averaged[0]}
        self.figures[trainer.step] = {"rate": metrics["lr"], "raw": raw[1], "averaged": averaged[1],
                                      "apart": far(raw[0], averaged[0]).mean().item()}
        print(f"step {trainer.step}  {self.figures[trainer.step]}")

    def look(self, trainer, objective):
        "Samples, the same noise and labels each time; and figures."
        labels = torch.arange(self.samples) % objective.denoiser.num_classes
        drawn = torch.cat([d.images.cpu() for d in generate(
            objective.denoiser, self.samples, labels, seed=1, sampling=trainer.cfg.sampling,
            space=objective.space)])
        held = objective.validate(trainer.datasets.validation, trainer.world)
        eye, real = create_features("shapes-a"), held_out(trainer, self.samples)
        return drawn, {"validation_loss": held["validation_loss"], "fd": fd(eye(drawn), eye(real))}


def far(a: Tensor, b: Tensor) -> Tensor:  # both uint8 (n, C, H, W); (n,)
    "Distances of images, in grey levels."
    return (a.float() - b.float()).square().flatten(1).mean(1).sqrt()


def held_out(trainer, n: int) -> Tensor:  # uint8 (n, C, H, W)
    return to_uint8(trainer.datasets.test.batch(torch.arange(n)).images)


def nearest_seen(trainer, images: Tensor) -> tuple[Tensor, Tensor]:
    "To each image the nearest one that the run was trained on, and its distance in grey levels."
    train, t = trainer.datasets.train, trainer.cfg.training
    seen = sample_indices(torch.arange(trainer.step*t.batch_size), len(train), t.seed).unique()
    best, found = torch.full((len(images),), float("inf"), dtype=torch.float64), images.clone()
    for part in seen.split(2000):  # a few at a time: all of them together are a gigabyte
        known = to_uint8(train.batch(part).images)
        distance, which = nearest(to_float(images).flatten(1), to_float(known).flatten(1))
        nearer = distance[:, 0] < best
        best[nearer], found[nearer] = distance[nearer, 0], known[which[nearer, 0]]
    return found, far(images, found)


def picture(rows: list, path: Path) -> None:
    "Rows of images, a label before each; None is a gap. A PNG of at most 256 colours."
    import matplotlib.pyplot as plt
    from PIL import Image
    def enlarged(x): return x.repeat_interleave(ENLARGED, 2).repeat_interleave(ENLARGED, 3)
    large = [row and image_grid(enlarged(row[1]), ncol=len(row[1]), pad=1) for row in rows]
    margin, gap = 96, 12
    wide = margin + large[0].shape[1]
    high = top = sum(gap if strip is None else len(strip) for strip in large)
    fig = plt.figure(figsize=(wide/100, high/100), dpi=100, facecolor="white")
    for row, strip in zip(rows, large):
        top -= gap if row is None else len(strip)
        if row is None: continue
        fig.figimage(strip, margin, top)
        fig.text(0, (top + len(strip)/2)/high, row[0], size=10, va="center")
    fig.canvas.draw()
    pixels = Image.frombuffer("RGBA", fig.canvas.get_width_height(), fig.canvas.buffer_rgba())
    pixels = pixels.convert("RGB").quantize(256, kmeans=1, dither=Image.Dither.NONE)
    pixels.save(path, "PNG", optimize=True)
    plt.close(fig)
    print(f"{path}: {pixels.width} x {pixels.height} pixels, {path.stat().st_size:,} bytes")


def pair(watch: Watch, step: int, shown: Tensor) -> list:
    return [(f"step {step:,}\n{kind}", images[shown]) for kind, images in watch.drawn[step].items()]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/watched"), help="run and figures")
    parser.add_argument("--pictures", type=Path, help="where to write the two; default: --out")
    parser.add_argument("--steps", type=int, help="of the training; default: the config's")
    parser.add_argument("--samples", type=int, default=64, help="to draw at a step; default 64")
    args = parser.parse_args(argv)
    if args.samples < 16: parser.error(f"--samples: found {args.samples}; allowed: 16 or more")
    cfg = load_config("quickstart", {
        "output_dir": str(args.out), "progress": False, "validation_size": 256,
        **({"max_steps": args.steps} if args.steps else {})})
    steps = [max(1, round(share*cfg.training.max_steps)) for share in SHARES]
    watch = Watch(steps, args.samples)
    trainer = Trainer(cfg, callbacks=[watch]).fit()
    if trainer.stopped_by: parser.exit(1, f"stopped at step {trainer.step}: no picture is made\n")
    last, folder = watch.drawn[steps[-1]]["averaged"], args.pictures or args.out
    folder.mkdir(parents=True, exist_ok=True)
    close, distances = nearest_seen(trainer, torch.cat([last, held_out(trainer, args.samples)]))
    rows = [row for step in steps for row in [*pair(watch, step, SHOWN), None]]
    picture([*rows, ("nearest\ntraining\nimages", close[SHOWN])], folder/"training.png")
    picture([*pair(watch, steps[1], SHOWN + 8), None, *pair(watch, steps[-1], SHOWN + 8)],
            folder/"ema.png")
    sampled, real = distances.split(args.samples)
    figures = {"samples": args.samples, "steps": watch.figures, "nearest trained on, median": {
        "samples": sampled.median().item(), "held out": real.median().item()}}
    (args.out/"watched.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__": main()
