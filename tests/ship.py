"""Make a shipped model of a run: its averaged weights in 16 bits, and a card that says all of them.

    python tests/ship.py RUN NAME --about "What it draws, in a sentence." --data-licence "..."

It writes diffusion_model/models/NAME, a checkpoint that `load_denoiser(NAME)` opens: the weights
that a run is drawn with (model.safetensors) and its settings without the paths of one machine
(config.yaml), each with its sha256 (manifest.json), the first images of seed 0 (samples.png), and
the card (README.md), whose facts stand at its top as YAML. What the run knows is taken from it: its
command and how long it took, and the figures of `diffusion-evaluate --checkpoint RUN`, which must
have judged it. The rest is said by options; what is missing is named. 64 images are drawn with the
run's weights and with the rounded ones, and the card says by how many grey levels they differ.
"""
import argparse
import json
import re
import shlex
import shutil
import tempfile
import time
from datetime import datetime
from pathlib import Path

import torch
import yaml
from front import counted, read_card
from torch import Tensor

from diffusion_model import cli
from diffusion_model.checkpoint import (Checkpoint, load_checkpoint, save_checkpoint,
                                        wait_for_checkpoints)
from diffusion_model.config import Config, DataConfig, change_config
from diffusion_model.denoiser import Denoiser
from diffusion_model.generation import generate, load_denoiser
from diffusion_model.plotting import save_grid
from diffusion_model.tracking import read_status

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT/"diffusion_model"/"models"
LIMIT, LIMITS = 4_000_000, {"avatars": 8_000_000}  # bytes of a model's folder
DRAWN, KEPT = 64, 8  # images that are compared; that samples.png shows
KINDS = {"fp16": torch.float16, "bf16": torch.bfloat16}
#: what a card must tell
FACTS = ("name", "about", "data", "data_licence", "licence", "config", "command", "seed", "steps",
         "minutes", "device", "torch", "parameters", "bytes", "prompts", "figures", "judged",
         "rounding", "drawing")


def rounded(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    "Weights in 16 bits; whole numbers stay. Raises ValueError where they do not fit."
    dtype = KINDS[kind]
    found = {name: w.to(dtype) if w.is_floating_point() else w for name, w in state.items()}
    lost = [name for name, w in found.items() if w.is_floating_point() and not w.isfinite().all()]
    if lost: raise ValueError(f"--kind: {kind} cannot hold {', '.join(lost[:3])}, whose numbers "
                              f"exceed {torch.finfo(dtype).max:g}: choose bf16")
    return found


def zeroed(state: dict[str, Tensor], small: dict[str, Tensor]) -> int:
    "How many weights were too small to be told from 0."
    return sum(((w != 0) & (small[name] == 0)).sum().item() for name, w in state.items())


def cleaned(cfg: Config, name: str) -> Config:
    "Settings that name no machine's path, and draw the same everywhere."
    fields = {"data.root": DataConfig().root, "data.download": False, "training.device": "auto",
              "logging.output_dir": f"outputs/shipped/{name}", "sampling.sample_precision": "fp32"}
    if cfg.data.space == "latents": fields["data.autoencoder"] = name  # which carries its own
    return change_config(cfg, fields)


def draw(denoiser: Denoiser, n: int, prompts: list[str] = (), **sampling) -> Tensor:  # uint8
    "Images of seed 0, as `diffusion-sample` draws them: of all classes in turn, or of the prompts."
    cfg, kinds = denoiser.config, cli._kinds(denoiser)
    asked = {cli._the("text", "caption", kinds, "--prompt", "was trained without captions"):
             ("--prompt", list(prompts))} if prompts else {}
    found = cli._conditions(asked, kinds, denoiser, n, cfg)
    stream = generate(denoiser, n, cli._condition(denoiser, found, n),
                      sampling=cfg.sampling.model_copy(update=sampling))
    return torch.cat([drawn.images for drawn in stream])


def compare(a: Tensor, b: Tensor) -> dict:
    "By how many grey levels two sets of images differ at most, and in what share of all numbers."
    apart = (a.int() - b.int()).abs()
    share = (apart > 0).double().mean().item()
    return {"grey_levels": apart.max().item(), "share": round(share, 5)}


def without_paths(words: list[str]) -> str:
    "A command, with the last name alone of each path that begins at a machine's root or home."
    return shlex.join(re.sub(r"(^|=)[~/]\S*/([^/\s]+)/?$", r"\1\2", word) for word in words)


def started(run: Path) -> dict:
    "What a run's records say of how it was made: nothing where it was resumed, or they are gone."
    file, ended = run/"starts.jsonl", read_status(run).get("updated")
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    if len(rows) != 1 or not ended: return {}
    (row,), words = rows, rows[0]["command"]
    took = datetime.fromisoformat(ended) - datetime.fromisoformat(row["started"])
    named = [b for a, b in zip(words, words[1:]) if a == "--config"] + \
        [word.partition("=")[2] for word in words if word.startswith("--config=")]
    return {"command": without_paths(words), "minutes": round(took.total_seconds()/60, 1),
            "device": f"{row['device']}, {counted(row['threads'], 'thread')}",
            **({"config": Path(named[0]).stem} if named else {})}


def judged(report: Path | None) -> dict:
    "The figures of a report.json, each beside its floor; and what was judged."
    if report is None: return {}
    found = json.loads(report.read_text())
    figures = {f"{line['metric']}/{line['eye'].partition('@')[0]}": {
        "value": float(f"{line['value']:.4g}"),
        "floor": line["floor"] and float(f"{line['floor']['mean']:.4g}"),
        "better": line["better"]} for line in found["results"]}
    s = found["sampling"]
    return {"figures": figures, "judged": f"{found['samples']['count']:,} images of seed "
            f"{s['seed']} ({s['solver']}, {s['steps']} steps, guidance {s['guidance_scale']:g}) "
            f"beside {found['reference']['count']:,} of {found['reference']['name']}"}


def find_report(run: Path, checkpoint: Checkpoint) -> Path | None:
    "The newest verdict on this checkpoint."
    found = run.glob(f"evaluation/{checkpoint.path.name}_seed_*/report.json")
    return max(found, key=lambda p: p.stat().st_mtime, default=None)


TEMPLATE = """---
{yaml}---

# {name}

{about}

![The first {kept} images of seed 0](samples.png)

```sh
diffusion-sample --checkpoint {name}{words}
```

```python
from diffusion_model.generation import load_denoiser
denoiser = load_denoiser("{name}")
```

| fact | |
|---|---|
| data | {data} |
| made by | `{command}` |
| config, seed | `{config}` (all of it: config.yaml), {seed} |
| training | {steps:,} steps, {minutes:g} minutes ({device}), torch {torch} |
| size | {parameters:,} parameters, {mb:.2f} MB |
| 64 images | {drawing} |

## How good is it?

{judged}; judged before the weights were rounded. The floor is what real images get.

| metric | value | floor | better |
|---|---|---|---|
{rows}

## In 16 bits

The weights are the run's average, rounded to {kind}; {zeroed}. In 64 images drawn with them and
with 32 bits, from the same noise, no number differs by more than {grey}, and {share:.2%} of all
differ at all.

## Licence

The weights: {licence}. The data: {data_licence}.
"""


def write_card(facts: dict) -> str:
    "The card: the facts as YAML, and the same for readers."
    shown = lambda x: "" if x is None else f"{x:g}"
    rows = "\n".join(f"| {name} | {shown(f['value'])} | {shown(f['floor'])} | {f['better']} |"
                     for name, f in facts["figures"].items())
    r, one = facts["rounding"], facts["prompts"][:1]
    grey, lost = r["grey_levels"], r["zeroed"]
    more = {"yaml": yaml.safe_dump(facts, sort_keys=False, allow_unicode=True), "rows": rows,
            "mb": facts["bytes"]/1e6, "kept": KEPT, "kind": r["kind"], "share": r["share"],
            "words": f" --prompt {shlex.quote(one[0])}" if one else "",
            "grey": counted(grey, "grey level"),
            "zeroed": f"{lost:,} of them were too small to be told from 0" if lost
            else "none was too small for it"}
    return TEMPLATE.format(**facts | more)


def write_model(checkpoint: Checkpoint, folder: Path, name: str, kind: str) -> int:
    "The checkpoint with rounded weights alone, as `folder`; how many of them are 0 now."
    main = checkpoint.weights("ema" if "ema" in checkpoint.emas else "model")
    others = {n: rounded(checkpoint.weights(n), kind) for n in checkpoint.networks if n != "model"}
    small = rounded(main, kind)
    step = save_checkpoint(
        folder.with_suffix(".run"), checkpoint.step, {"model": small, **others}, None, None,
        cleaned(checkpoint.config, name), classes=checkpoint.classes, score=checkpoint.score,
        vocabulary=checkpoint.vocabulary, network_name=checkpoint.network_name,
        architectures=checkpoint.architectures)
    wait_for_checkpoints()
    step.rename(folder)
    return zeroed(main, small)


def tried(checkpoint: Checkpoint, folder: Path, kind: str, prompts: list[str]) -> dict:
    "Draw with the run's weights and with the rounded ones: how they differ, and how long it takes."
    whole, small = load_denoiser(checkpoint), load_denoiser(folder)
    before = draw(whole, DRAWN, prompts, sample_precision="fp32")
    start = time.process_time()  # what else the machine does has no part in it
    after = draw(small, DRAWN, prompts)
    took = time.process_time() - start
    save_grid(after[:KEPT], folder/"samples.png", ncol=KEPT)
    return {"parameters": sum(p.numel() for p in small.network.parameters()),
            "rounding": {"kind": kind, **compare(before, after)},
            "drawing": f"{took:.1f} s of one CPU core"}


def ship(
    run: Path,       # a run directory
    name: str,       # of the model
    kind: str = "fp16",      # of KINDS
    prompts: list[str] = (),  # in turn, for a model that reads
    report: Path = None,     # default: the newest of `diffusion-evaluate` in the run
    models: Path = MODELS,   # where it goes
    **said,                  # facts that the run does not know, or not rightly
) -> Path:                   # models/NAME
    "Write a shipped model. Raises ValueError for a fact that is missing, and for one too large."
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name): raise ValueError(
        f"name: found '{name}'; allowed: small letters, digits and _, such as fashion_mnist")
    run, checkpoint = Path(run), load_checkpoint(run)
    t = checkpoint.config.training
    facts = {"name": name, "licence": "Apache-2.0", "data": checkpoint.config.data.dataset,
             "seed": t.seed, "steps": checkpoint.step, "prompts": list(prompts),
             "torch": json.loads((checkpoint.path/"manifest.json").read_text())["torch"],
             **started(run), **judged(report or find_report(run, checkpoint)),
             **{k: v for k, v in said.items() if v is not None}}
    late = {"parameters", "bytes", "rounding", "drawing"}
    missing = [key for key in FACTS if key not in facts and key not in late]
    if missing: raise ValueError(
        f"{run} does not say {', '.join(missing)}: say them by --about, --config and so on; "
        f"figures come from a report: diffusion-evaluate --checkpoint {run}, or --report FILE")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, name)
        lost = write_model(checkpoint, folder, name, kind)
        facts |= tried(checkpoint, folder, kind, prompts)
        facts["rounding"]["zeroed"] = lost
        facts["bytes"] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        text = write_card({key: facts[key] for key in FACTS})
        (folder/"README.md").write_text(text, "utf-8")
        size, most = sum(f.stat().st_size for f in folder.iterdir()), LIMITS.get(name, LIMIT)
        if size > most: raise ValueError(
            f"{name}: found {size:,} bytes; allowed: {most:,}: train a smaller network")
        shutil.rmtree(models/name, ignore_errors=True)
        shutil.copytree(folder, models/name)
    return models/name


def main(argv: list[str] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("name", help="of the model")
    parser.add_argument("--kind", choices=KINDS, default="fp16", help="of numbers; default fp16")
    parser.add_argument("--prompt", action="append", default=[], help="in turn, if it reads")
    parser.add_argument("--report", type=Path, help="default: the run's newest report.json")
    for fact in ("about", "data", "data-licence", "licence", "config", "command", "device"):
        parser.add_argument(f"--{fact}")
    parser.add_argument("--minutes", type=float, help="of training, if the run was resumed")
    args = vars(parser.parse_args(argv))
    try: folder = ship(**{"prompts" if k == "prompt" else k: v for k, v in args.items()})
    except (ValueError, OSError) as error: parser.error(str(error))
    facts, size = read_card(folder), sum(f.stat().st_size for f in folder.iterdir())
    print(f"{folder}: {size:,} bytes of {LIMITS.get(args['name'], LIMIT):,}; 64 images in "
          f"{facts['drawing']}; {facts['rounding']}")


if __name__ == "__main__": main()
