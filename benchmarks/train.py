"""How fast do we train, beside other libraries, on the same work?

The same graph and the same work in every variant: DDPM's U-Net in two sizes (small: 6.47 M
parameters, 2.9 GFLOP a 32×32×1 image, 64 a step; cifar: DDPM's network for CIFAR-10, 35.75 M,
12.4 GFLOP, 16 a step). A step is forward, squared error against the noise, backward and a step of
AdamW; the images lie in memory. Peers use `torch.optim.AdamW` as it comes. "ours" is that step with
our network, layout, precision and optimizer as the config's automatic defaults choose them; the
rows "a whole step" are `Trainer.train_step`: in addition it draws noise and times by counter,
checks and clips gradients, and keeps the average of the weights.

diffusers is measured as shipped (float32, the default layout) and at its best: bfloat16 autocast,
in either layout, of which the better counts. denoising-diffusion-pytorch and smalldiffusion have
other graphs; theirs are the nearest, and the column of GFLOP says how near.

Last, the preset for CPUs (`configs/fashion_mnist.yaml`, whose patch stem saves work) beside
diffusers' network of as many parameters, on images of the same size.

    python benchmarks/train.py --peers [--size small] [--rounds 5] [--batch 64] [--json FILE]

How turns, memory and the machine's limit are measured: see `turns.py`. Five minutes or less on two
cores.
"""
import statistics
from contextlib import nullcontext

import turns
from turns import SIZES, Player, Variant, Work, cell

BATCH = {"small": 64, "cifar": 16, "smoke": 2, "preset": 64}
SHIPPED, OURS, PRESET = "diffusers, as shipped", "ours, automatic", "preset fashion_mnist"


# -- in a variant's own process; each imports what it needs, and nothing of the others
def batch_of(channels: int, side: int, batch: int, device: str, layout) -> tuple:
    "Noisy images, times, and the noise that is sought: the same in each variant."
    import torch
    made = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(batch, channels, side, side, generator=made) for _ in range(2))
    t = torch.randint(0, 1000, (batch,), generator=made)
    return x.to(device, memory_format=layout), t.to(device), noise.to(device)


def step_of(network, optimizer, x, noise, precise, answer):
    "A bare step: forward (in the context that `precise` makes), squared error, backward, step."
    import torch.nn.functional as F

    def step():
        optimizer.zero_grad(set_to_none=True)
        with precise(): loss = F.mse_loss(answer(network), noise)
        loss.backward()
        optimizer.step()
    return step


def measured(network, step, x, one, precision) -> Work:
    return Work(step, lambda: turns.forward_flops(network, *one), len(x),
                turns.parameters(network), precision)


def config_of(size: str, batch: int, more: dict):
    "Our config: the defaults, and what the size says."
    from diffusion_model.config import load_config
    base = {"dataset": "shapes", "train_size": max(batch, 16), "validation_size": 16,
            "test_size": 16, "batch_size": batch, "progress": "false", "channels": 1,
            "dropout": 0., "horizontal_flip": "false"}
    if size == "preset": return load_config("fashion_mnist", base | more | {
        "dataset": "FashionMNIST"})
    return load_config("default", base | SIZES[size] | {"optimizer": "adamw"} | more)


def data_of(cfg, batch: int):
    "Random bytes in memory, in place of what the config names."
    import torch
    from diffusion_model.config import KNOWN_CLASSES
    from diffusion_model.dataset import ArraySource, ImageSet, create_dataset
    drawn = create_dataset(cfg.data.model_copy(update={"dataset": "shapes"}))
    classes = getattr(cfg.model, "num_classes", 0)
    made = torch.Generator().manual_seed(0)
    shape = (max(batch, 16), *cfg.data.shape)
    images = torch.randint(0, 256, shape, generator=made, dtype=torch.uint8)
    names = [str(i) for i in range(classes or KNOWN_CLASSES["shapes"])]
    labels = torch.arange(len(images)) % len(names)
    train = ImageSet(ArraySource(images, labels, names), drawn.train.transform)
    return drawn._replace(train=train, classes=names)


def ours(device: str, size: str, batch: int, precision: str | None = None,
         whole: bool = False) -> Work:
    "Our network, or the whole step of the trainer, as the config's defaults have it."
    import torch
    from diffusion_model.speed import autocast, keep_memory
    from diffusion_model.training import Trainer
    turns.imported()
    more = {"training.precision": precision} if precision else {}
    cfg = config_of(size, batch, {"device": device} | more)
    trainer = Trainer(cfg, data_of(cfg, batch), callbacks=[])
    trainer.objective.train()
    trainer.check_precision()  # this, and what follows, as `Trainer.fit` begins
    if trainer.levers.keep_memory: keep_memory()
    levers, network = trainer.levers, trainer.objective.networks["model"]
    layout = torch.channels_last if levers.channels_last else torch.contiguous_format
    x, t, noise = batch_of(*trainer.objective.space.shape[:2], batch, device, layout)
    labels = () if not cfg.model.num_classes else \
        (torch.arange(batch, device=device) % cfg.model.num_classes,)
    one = (x[:1], t[:1], *(y[:1] for y in labels))
    if whole:
        given = trainer.loader.at(0)
        return measured(network, lambda: trainer.train_step(given), x, one, levers.precision)
    trainer.emas.clear()  # a bare step keeps no average
    trainer.ema = None
    step = step_of(network, trainer.optimizer, x, noise,
                   lambda: autocast(levers.precision, trainer.device), lambda n: n(x, t, *labels))
    return measured(network, step, x, one, levers.precision)


def their_unet(size: str):
    "diffusers' network of the same graph, and its number of classes."
    from diffusers import UNet2DModel
    plain, attends = "DownBlock2D", "AttnDownBlock2D"
    side, channels, groups, blocks, classes = 32, 1, 32, 2, None
    if size == "small": widths, kinds = (64, 128, 128), (plain, plain, attends)
    elif size == "cifar": channels, widths, kinds = 3, (128, 256, 256, 256), \
        (plain, attends, plain, plain)
    elif size == "preset": widths, kinds, blocks, groups, classes = (32, 64, 96), \
        (plain, attends, attends), 1, 8, 11
    else: side, widths, kinds, blocks, groups = 16, (8, 16), (plain, attends), 1, 4
    return UNet2DModel(
        sample_size=side, in_channels=channels, out_channels=channels, layers_per_block=blocks,
        block_out_channels=widths, down_block_types=kinds, norm_num_groups=groups,
        up_block_types=tuple(k.replace("Down", "Up") for k in reversed(kinds)),
        attention_head_dim=None, norm_eps=1e-6, num_class_embeds=classes), (channels, side), classes


def diffusers(device: str, size: str, batch: int, precision: str = "fp32", last: bool = False,
              fused: bool = False, compile: bool = False) -> Work:
    "diffusers' UNet2DModel."
    import torch
    network, shape, classes = their_unet(size)
    turns.imported()
    layout = torch.channels_last if last else torch.contiguous_format
    network = network.to(device, memory_format=layout).train()
    x, t, noise = batch_of(*shape, batch, device, layout)
    labels = torch.arange(batch, device=device) % 10 if classes else None
    work = measured(network, None, x, (x[:1], t[:1], labels[:1] if classes else None), precision)
    if compile: network.compile()
    optimizer = torch.optim.AdamW(network.parameters(), fused=fused or None)
    low = precision == "bf16"
    return work._replace(turn=step_of(
        network, optimizer, x, noise, lambda: torch.autocast(device, torch.bfloat16, low),
        lambda n: n(x, t, labels).sample))


def denoising_diffusion_pytorch(device: str, size: str, batch: int) -> Work:
    "denoising-diffusion-pytorch's nearest network."
    import torch
    from denoising_diffusion_pytorch import Unet
    turns.imported()
    dim, mults, channels = {"small": (64, (1, 2, 2), 1), "cifar": (128, (1, 2, 2, 2), 3),
                            "smoke": (8, (1, 2), 1)}[size]
    network = Unet(dim, dim_mults=mults, channels=channels).to(device)
    x, t, noise = batch_of(channels, 16 if size == "smoke" else 32, batch, device,
                           torch.contiguous_format)
    optimizer = torch.optim.AdamW(network.parameters())
    step = step_of(network, optimizer, x, noise, nullcontext, lambda n: n(x, t))
    return measured(network, step, x, (x[:1], t[:1]), "fp32")


def smalldiffusion(device: str, size: str, batch: int) -> Work:
    "smalldiffusion's nearest network."
    import torch
    from smalldiffusion.model_unet import Unet
    turns.imported()
    side, channels, width, mults, blocks, attends = {
        "small": (32, 1, 64, (1, 2, 2), 2, (8,)), "cifar": (32, 3, 128, (1, 2, 2, 2), 2, (16,)),
        "smoke": (16, 1, 32, (1, 2), 1, (8,))}[size]
    network = Unet(side, channels, channels, ch=width, ch_mult=mults, num_res_blocks=blocks,
                   attn_resolutions=attends, dropout=0.).to(device)
    x, t, noise = batch_of(channels, side, batch, device, torch.contiguous_format)
    optimizer, sigma = torch.optim.AdamW(network.parameters()), (t + 1)/100
    step = step_of(network, optimizer, x, noise, nullcontext, lambda n: n(x, sigma))
    return measured(network, step, x, (x[:1], sigma[:1]), "fp32")


# -- in the parent's process
def variants(size: str, batch: int, peers: bool, more: dict) -> list[Variant]:
    "The rows of a size. `more`: options of diffusers at its best."
    same = {"size": size, "batch": batch}
    theirs = [Variant(SHIPPED, diffusers, same)]
    if size == "preset":
        rows = [Variant(PRESET, ours, same),
                Variant(f"{PRESET}, a whole step", ours, same | {"whole": True}, 2)]
        return theirs*peers + rows
    rows = [Variant("ours, fp32", ours, same | {"precision": "fp32"}),
            Variant(OURS, ours, same),
            Variant("ours, fp32, a whole step", ours, same | {"precision": "fp32", "whole": True}),
            Variant("ours, automatic, a whole step", ours, same | {"whole": True})]
    theirs += [
        Variant("diffusers, bf16", diffusers, same | {"precision": "bf16"} | more),
        Variant("diffusers, bf16, channels last", diffusers,
                same | {"precision": "bf16", "last": True} | more),
        Variant("denoising-diffusion-pytorch", denoising_diffusion_pytorch, same),
        Variant("smalldiffusion", smalldiffusion, same)]
    return theirs*peers + rows


def line(p: Player, base: Player | None, best: Player | None, limits: dict, device: str) -> list:
    "A row of the table."
    if p.failed or not p.seconds: return [p.variant.name, *["–"]*11]
    seconds, work = statistics.median(p.seconds), p.work
    speed = 3*p.flops*work.images/seconds/1e9  # a step is about three forward passes
    limit = limits.get(f"{'matmul' if device == 'cuda' else 'conv'} {work.precision}")
    return [p.variant.name, f"{work.parameters/1e6:.2f}", f"{p.flops/1e9:.2f}", work.precision,
            f"{work.images/seconds:,.1f}", cell(turns.ratio(p, base)), cell(turns.ratio(p, best)),
            f"{speed:,.0f}", cell(speed/limit if limit else None), f"{p.peak/1e6:,.0f}",
            cell(p.peak/base.peak if base and base.peak else None),
            f"{(p.peak - p.libraries)/1e6:,.0f}"]


def show(players: list[Player], limits: dict, device: str) -> None:
    "The table of one size."
    base, best = turns.compared(players, SHIPPED, diffusers)
    head = ["training", "M params", "GFLOP", "in", "images/s", "× shipped", "× its best", "GFLOP/s",
            "of limit", "peak MB", "× peak", "own MB"]
    turns.table(head, [line(p, base, best, limits, device) for p in players])
    turns.say_failures(players)


def main() -> None:
    p = turns.parser(__doc__.splitlines()[0])
    p.add_argument("--batch", type=int, help="images a step (default: 64, of cifar 16)")
    p.add_argument("--fused", action="store_true", help="diffusers at its best: fused AdamW, too")
    p.add_argument("--compile", action="store_true", help="and compiled, too")
    p.add_argument("--no-preset", action="store_true", help="leave the preset out")
    args = turns.settle(p.parse_args())
    found = {"machine": turns.machine(args), "rounds": args.rounds, "sizes": {}}
    turns.say_machine(found["machine"])
    sizes = ["small", "cifar"] if args.size == "both" else [args.size]
    if args.size in ("small", "both") and not args.no_preset: sizes.append("preset")
    more = {"fused": args.fused, "compile": args.compile}
    for size in sizes:
        batch = args.batch or BATCH[size]
        players, limits = turns.take_turns(variants(size, batch, args.peers, more), args.rounds,
                                           args.threads, args.device, args.smoke)
        print(f"{size}: {batch} images a step, median of {args.rounds} rounds")
        turns.say_limits(limits)
        show(players, limits, args.device)
        found["sizes"][size] = {"batch": batch, "limits": limits,
                                "rows": [turns.row_of(p) for p in players]}
        turns.write(args, found)


if __name__ == "__main__": main()
