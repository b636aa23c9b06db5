"""How fast do we sample, beside diffusers, on the same work?

A step of drawing 1 and 16 images with DDPM's U-Net in two sizes (small: 6.47 M parameters, 2.9
GFLOP a 32×32×1 image; cifar: DDPM's network for CIFAR-10, 35.75 M, 12.4 GFLOP). Whole drawings are
timed, from noise to bytes, and divided by their steps. Ours is `generate` on what `load_denoiser`
has opened, solver and precision as the config's defaults choose them: batches of one stream. What
comes once, before or in the first batch (packing weights, compiling), stands in a column of its
own, `to begin`. diffusers' is the loop of its own DDIM pipeline: UNet2DModel and DDIMScheduler, as
shipped (float32, the default layout) and at its best: weights in bfloat16, in either layout, of
which the better counts, and (`--compile`) compiled.

    python benchmarks/sample.py --peers [--size small] [--rounds 5] [--batch 1] [--json FILE]

How turns, memory and the machine's limit are measured: see `turns.py`. Four minutes or less on two
cores.
"""
import statistics
import tempfile
from pathlib import Path

import train
import turns
from turns import Player, Variant, Work, cell

SHIPPED = "diffusers, as shipped"
STEPS = {1: 10}  # of a drawing; else 4: enough that what happens once counts little


def steps_of(batch: int) -> int: return STEPS.get(batch, 4)


# -- in a variant's own process; each imports what it needs, and nothing of the others
def saved(device: str, size: str, folder: str) -> Work:
    "Write the checkpoints that ours are opened from; their weights are random, none of them zero."
    import torch
    from diffusion_model.checkpoint import wait_for_checkpoints
    from diffusion_model.training import Trainer
    for name, more in (("automatic", {}), ("fp32", {"sample_precision": "fp32"})):
        cfg = train.config_of(size, 16, {"device": "cpu", "output_dir": f"{folder}/{name}"} | more)
        trainer = Trainer(cfg, train.data_of(cfg, 16), callbacks=[])
        with torch.no_grad():
            for p in trainer.objective.averaged.parameters(): p.add_(0.02*torch.randn_like(p))
        trainer.ema.load_state_dict(trainer.objective.averaged.state_dict())
        trainer.save()
        wait_for_checkpoints()
    return Work(None)


def ours(device: str, size: str, folder: str, batch: int, precision: str | None = None) -> Work:
    "A drawing by `generate`."
    import torch
    from diffusion_model.generation import generate, load_denoiser
    from diffusion_model.speed import choose_precision
    turns.imported()
    denoiser = load_denoiser(f"{folder}/{precision or 'automatic'}", device=device)
    sampling = denoiser.config.sampling.model_copy(
        update={"steps": steps_of(batch), "sample_batch_size": batch})
    precision = choose_precision(sampling.sample_precision, torch.device(device))
    network, shape = denoiser.network, denoiser.space.shape
    stream = generate(denoiser, 1_000_000*batch, sampling=sampling)  # a drawing after the other
    def turn(): return next(stream)

    def count():
        return turns.forward_flops(network, torch.zeros(1, *shape, device=device),
                                   torch.zeros(1, device=device))
    return Work(turn, count, batch, turns.parameters(network), precision)


def diffusers(device: str, size: str, batch: int, precision: str = "fp32", last: bool = False,
              compile: bool = False) -> Work:
    "A drawing by UNet2DModel and DDIMScheduler, as DDIMPipeline does it."
    import torch
    from diffusers import DDIMScheduler
    from diffusers.utils import logging
    logging.set_verbosity_error()  # it warns of layers to be kept in float32, of which it has none
    network, (channels, side), _ = train.their_unet(size)
    turns.imported()
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    layout = torch.channels_last if last else torch.contiguous_format
    network = network.to(device, kind).to(memory_format=layout).eval()
    scheduler, made = DDIMScheduler(), torch.Generator(device).manual_seed(0)
    start = dict(generator=made, device=device, dtype=kind)
    ran = torch.compile(network) if compile else network

    @torch.no_grad()
    def turn():
        x = torch.randn(batch, channels, side, side, **start).to(memory_format=layout)
        scheduler.set_timesteps(steps_of(batch))
        for t in scheduler.timesteps:
            x = scheduler.step(ran(x, t).sample, t, x).prev_sample
        return ((x/2 + 0.5).clamp(0, 1)*255).round().to(torch.uint8).cpu()

    def count():
        x = torch.zeros(1, channels, side, side, device=device, dtype=kind)
        return turns.forward_flops(network, x, torch.zeros(1, device=device))
    return Work(turn, count, batch, turns.parameters(network), precision)


# -- in the parent's process
def variants(size: str, batch: int, folder: str, peers: bool, compile: bool) -> list[Variant]:
    "The rows of a size and a number of images."
    same, calls = {"size": size, "batch": batch}, 3 if batch == 1 else 1
    low = same | {"precision": "bf16"}
    theirs = [Variant(SHIPPED, diffusers, same, calls),
              Variant("diffusers, bf16", diffusers, low, calls),
              Variant("diffusers, bf16, channels last", diffusers, low | {"last": True}, calls)]
    if compile: theirs.append(
        Variant("diffusers, bf16, compiled", diffusers, low | {"compile": True}, calls))
    same = same | {"folder": folder}
    return theirs*peers + [Variant("ours, fp32", ours, same | {"precision": "fp32"}, calls),
                           Variant("ours, automatic", ours, same, calls)]


def line(p: Player, base: Player | None, best: Player | None, limits: dict, device: str) -> list:
    "A row of the table."
    if p.failed or not p.seconds: return [p.variant.name, *["–"]*11]
    work, step = p.work, statistics.median(p.seconds)/steps_of(p.work.images)
    speed = p.flops*work.images/step/1e9
    limit = limits.get(f"{'matmul' if device == 'cuda' else 'conv'} {work.precision}")
    return [p.variant.name, f"{work.parameters/1e6:.2f}", work.precision, f"{step*1e3:,.1f}",
            f"{(p.first - statistics.median(p.seconds))*1e3:,.0f}",
            cell(turns.ratio(p, base)), cell(turns.ratio(p, best)), f"{speed:,.0f}",
            cell(speed/limit if limit else None), f"{p.peak/1e6:,.0f}",
            cell(p.peak/base.peak if base and base.peak else None),
            f"{(p.peak - p.libraries)/1e6:,.0f}"]


def show(players: list[Player], limits: dict, device: str) -> None:
    "The table of one size and number of images."
    base, best = turns.compared(players, SHIPPED, diffusers)
    head = ["sampling", "M params", "in", "ms a step", "to begin, ms", "× shipped", "× its best",
            "GFLOP/s", "of limit", "peak MB", "× peak", "own MB"]
    turns.table(head, [line(p, base, best, limits, device) for p in players])
    turns.say_failures(players)


def main() -> None:
    p = turns.parser(__doc__.splitlines()[0])
    p.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="images at once")
    p.add_argument("--compile", action="store_true", help="diffusers compiled, too (slow to start)")
    args = turns.settle(p.parse_args())
    found = {"machine": turns.machine(args), "rounds": args.rounds, "sizes": {}}
    turns.say_machine(found["machine"])
    for size in ["small", "cifar"] if args.size == "both" else [args.size]:
        with tempfile.TemporaryDirectory(prefix="bench_", dir=".") as folder:
            saver = Player(Variant("save", saved, {"size": size, "folder": folder}), args.threads,
                           args.device, alone=not args.smoke)
            saver.ready()
            saver.close()
            if saver.failed: raise SystemExit(f"no checkpoint to draw from: {saver.failed}")
            for batch in args.batch[:1] if args.smoke else args.batch:
                rows = variants(size, batch, str(Path(folder)), args.peers, args.compile)
                players, limits = turns.take_turns(rows, args.rounds, args.threads, args.device,
                                                   args.smoke)
                print(f"{size}: {batch} at once, median of {args.rounds} rounds")
                turns.say_limits(limits)
                show(players, limits, args.device)
                found["sizes"][f"{size}, {batch}"] = {
                    "batch": batch, "steps": steps_of(batch), "limits": limits,
                    "rows": [turns.row_of(p) for p in players]}
                turns.write(args, found)


if __name__ == "__main__": main()
