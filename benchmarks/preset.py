"""What does the patch stem of the presets cost in quality, and what does it buy?

The quick start's network looks at squares of 2×2 pixels (`model.patch_size: 2`), which makes a step
about four times cheaper. Here the same network is trained without the stem as well: for as many
steps, and for as much time. Each is judged by `diffusion-evaluate`: FD through the two networks
that come with the data, beside the floor that real images get.

    python benchmarks/preset.py [--steps 400] [--samples 1000] [--json FILE]

About ten minutes on two cores. Runs go to a new folder here, and are deleted.
"""
import argparse
import json
import tempfile
import time
from pathlib import Path

from judge import judge

from diffusion_model.config import load_config
from diffusion_model.training import Trainer

EYES = ("shapes-a", "shapes-b")


def train(folder: Path, steps: int, **change) -> tuple[Path, float, int]:
    "Train; the run, its seconds a step, and its parameters."
    cfg = load_config("quickstart", {
        "output_dir": str(folder), "max_steps": steps, "validate_every": steps,
        "sample_every": steps, "checkpoint_every": steps, "logging.callbacks": ["log", "save"],
        "model.attention_resolutions": [], "model.attention_levels": [1, 2], **change})
    trainer = Trainer(cfg)
    begin = time.perf_counter()
    trainer.fit()
    size = sum(p.numel() for p in trainer.objective.parameters())
    return folder, (time.perf_counter() - begin)/steps, size


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="of the preset; default 400")
    parser.add_argument("--samples", type=int, default=1000, help="that are judged; default 1000")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures, for a program")
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        def run(name: str, steps: int, **change):
            made, pace, size = train(Path(folder)/name.replace(" ", "_"), steps, **change)
            rows.append({"network": name, "parameters": size, "steps": steps,
                         "seconds": pace*steps, "fd": judge(
                             made, EYES, "--checkpoint", str(made), "--num_samples",
                             str(args.samples))})
            say(rows[-1])
            return pace
        stem = run("patch stem", args.steps)
        plain = run("no stem, equal steps", args.steps, **{"model.patch_size": 1})
        run("no stem, equal time", max(1, round(args.steps*stem/plain)), **{"model.patch_size": 1})
    if args.json: args.json.write_text(json.dumps(rows, indent=1) + "\n")


def say(row: dict) -> None:
    fd = "; ".join(f"FD {name} {found['fd']:.2f} ({found['ratio']:.0f} × floor)"
                   for name, found in row["fd"].items())
    print(f"{row['network']:<22}{row['parameters']/1e6:.2f} M {row['steps']:>5} steps "
          f"{row['seconds']:>5.0f} s   {fd}", flush=True)


if __name__ == "__main__": main()
