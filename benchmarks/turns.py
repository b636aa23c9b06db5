"""What `train.py` and `sample.py` share: variants that take turns, the machine's limit, a table.

**Turns.** Each variant lives in a process of its own, so that its libraries, its allocator's
settings and its peak of memory are its own. All are pinned to the same cores; one works at a time,
the others wait for a word and use no processor. A round gives each of them a turn, and each round
begins with another one. So what the machine does on the side falls on all alike. A time is the
median over rounds; a ratio is the median of the ratios within a round. All processes of a size are
there at once: 16 GB of memory is enough for DDPM's network and all its peers.

**Memory.** The most that was resident (VmHWM of /proc, set back once all is built; elsewhere
ru_maxrss since the start), libraries included; `own` is what of it came after they were imported.
On a GPU, the most that torch had allocated there.

**Limit.** What the machine reaches in one large convolution (128 channels, 3×3, 32×32, channels
last, forward) and one large matrix product, in float32 and bfloat16, measured in turn as well.
"""
import argparse
import copy
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Callable, NamedTuple

SIZES = {  # name -> fields of our config: DDPM's graph in two widths
    "small": {"base_channels": 64, "channel_multipliers": "[1, 2, 2]", "num_res_blocks": 2,
              "attention_resolutions": "[8]", "channels": 1},
    "cifar": {"base_channels": 128, "channel_multipliers": "[1, 2, 2, 2]", "num_res_blocks": 2,
              "attention_resolutions": "[16]", "channels": 3},
    "smoke": {"base_channels": 8, "channel_multipliers": "[1, 2]", "num_res_blocks": 1,
              "attention_resolutions": "[8]", "channels": 1, "norm_groups": 4, "image_size": 16},
}


class Work(NamedTuple):
    "What a variant's process has built."
    turn: Callable       # the work itself
    count: Callable = None  # () -> FLOPs of a forward pass of one image; asked once all is timed
    images: int = 0      # that one call of `turn` is worth
    parameters: int = 0
    precision: str = "fp32"


class Variant(NamedTuple):
    "A row of the table."
    name: str
    make: Callable[..., Work]  # a function of the script, called in the variant's own process
    options: dict              # of `make`
    calls: int = 1             # of `turn`, a round


# -- in the variant's process
def resident(field: str) -> int:
    "VmRSS or VmHWM of this process, in bytes; where there is no /proc, the peak since its start."
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field): return int(line.split()[1])*1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak*1024


def forget_peak() -> None:
    "Let VmHWM begin anew, where the system lets us."
    try: Path("/proc/self/clear_refs").write_text("5")
    except OSError: pass


def peak(device: str) -> int:
    import torch
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def timed(turn: Callable, calls: int, device: str) -> float:
    "Seconds of a call; on a GPU by its own clock."
    import torch
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls): turn()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)/1e3/calls
    begin = time.perf_counter()
    for _ in range(calls): turn()
    return (time.perf_counter() - begin)/calls


def forward_flops(network, *inputs) -> int:
    "Of a forward pass, by torch's counter. Attention is written out: fused, it is not counted."
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    plain, network = torch.contiguous_format, copy.deepcopy(network)
    for p in network.parameters(): p.data = p.data.clone(memory_format=plain)
    inputs = [x.clone(memory_format=plain) if x is not None else x for x in inputs]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network.eval().forward(*inputs)  # not what it may have been compiled to
    return counter.get_total_flops()


def parameters(network) -> int: return sum(p.numel() for p in network.parameters())


def serve(pipe, variant: Variant, threads: int, device: str) -> None:
    "The life of a variant's process: build, then do as many calls as it is told, and tell."
    try:
        import torch
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        work = variant.make(device=device, **variant.options)
        forget_peak()
        if device == "cuda": torch.cuda.reset_peak_memory_stats()
        pipe.send(work._replace(turn=None, count=None))
        for calls in iter(pipe.recv, None):
            if calls == "rates": pipe.send(work.turn())
            elif calls == "count": pipe.send(work.count())
            else: pipe.send((timed(work.turn, calls, device), peak(device), LIBRARIES["bytes"]))
    except EOFError: pass
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        pipe.send(f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})")


LIBRARIES = {"bytes": 0}  # of this process: what is resident once the libraries are there


def imported() -> None:
    "To be called by `make` once it has imported what it needs: from here on memory is its own."
    LIBRARIES["bytes"] = resident("VmRSS")


# -- the machine's limit
def rates(device: str, smoke: bool = False) -> Work:
    "GFLOP/s of a convolution and a matrix product, in both precisions; a turn gives all four."
    import torch
    import torch.nn.functional as F
    big = device == "cuda"
    batch, side, calls = (512, 8192, 20) if big else (2, 64, 1) if smoke else (32, 2048, 3)
    work = {}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x = torch.randn(batch, 128, 32, 32, device=device, dtype=kind)
        x = x.to(memory_format=torch.channels_last)
        w = torch.randn(128, 128, 3, 3, device=device, dtype=kind)
        w = w.to(memory_format=torch.channels_last)
        a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
        work[f"conv {name}"] = (lambda x=x, w=w: F.conv2d(x, w, padding=1),
                                2*9*128*128*32*32*batch)
        work[f"matmul {name}"] = lambda a=a, b=b: a @ b, 2*side**3

    @torch.no_grad()
    def turn():
        return {name: flops/1e9/statistics.median(timed(call, 1, device) for _ in range(calls))
                for name, (call, flops) in work.items()}
    return Work(turn)


# -- in the parent's process
class Player:
    "A variant, and the process that it lives in (or, to see that all of it runs, a thread)."
    def __init__(self, variant: Variant, threads: int, device: str, alone: bool = True):
        context = multiprocessing.get_context("spawn")
        kind = context.Process if alone else threading.Thread
        self.variant, self.seconds, self.failed = variant, [], None
        self.work, self.flops, self.peak, self.libraries, self.first = None, 0, 0, 0, 0.
        self.pipe, theirs = context.Pipe()
        self.process = kind(target=serve, args=(theirs, variant, threads, device), daemon=True)
        self.process.start()
        if alone: theirs.close()

    def heard(self) -> Any:
        "What the process says; None once it has failed."
        try: said = self.pipe.recv()
        except EOFError:
            self.process.join()
            said = f"its process ended with code {self.process.exitcode}"
        if not isinstance(said, str): return said
        self.failed = said

    def ready(self) -> bool:
        self.work = self.heard()
        return not self.failed

    def ask(self, word: Any) -> Any:
        self.pipe.send(word)
        return self.heard()

    def turn(self, first: bool = False) -> None:
        "Note the seconds of a call; those of the first are no round's."
        if self.failed: return
        said = self.ask(1 if first else self.variant.calls)
        if self.failed: return
        seconds, self.peak, self.libraries = said
        if first: self.first = seconds
        else: self.seconds.append(seconds)

    def close(self) -> None:
        try: self.pipe.send(None)
        except OSError: pass  # it is gone already
        self.process.join(20)
        if self.process.is_alive() and hasattr(self.process, "kill"): self.process.kill()


def take_turns(variants: list[Variant], rounds: int, threads: int, device: str,
               smoke: bool = False) -> tuple[list[Player], dict[str, float]]:
    "Every variant, `rounds` times in turn, after one turn to warm up; and the machine's rates."
    limit = Player(Variant("rates", rates, {"smoke": smoke}), threads, device)
    players, found = [], []
    try:
        for v in variants:
            players.append(Player(v, threads, device, alone=not smoke))
            if smoke: players[-1].ready()  # threads would stumble over each other's imports
        for p in [limit] if smoke else [limit, *players]: p.ready()
        for p in players: p.turn(first=True)
        for i in range(rounds):
            if not limit.failed: found.append(limit.ask("rates"))
            for p in players[i % len(players):] + players[:i % len(players)]: p.turn()
            print(".", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        for p in players: p.flops = 0 if p.failed else p.ask("count") or 0
    finally:
        for p in (limit, *players): p.close()
    if limit.failed: print(f"rates: {limit.failed}", file=sys.stderr)
    found = [f for f in found if f]
    return players, {k: statistics.median(f[k] for f in found) for k in found[0]} if found else {}


def ratio(a: "Player | None", b: "Player | None") -> float | None:
    "How many times as fast is a as b: the median of the rounds."
    if a is None or b is None or not a.seconds or not b.seconds: return None
    return statistics.median(y/x for x, y in zip(a.seconds, b.seconds))


def quickest(players: list[Player]) -> "Player | None":
    fine = [p for p in players if p.seconds and not p.failed]
    return min(fine, key=lambda p: statistics.median(p.seconds), default=None)


# -- words
def parser(description: str) -> argparse.ArgumentParser:
    "The options that both scripts have."
    p = argparse.ArgumentParser(description=description,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--peers", action="store_true", help="beside ours, other libraries' networks "
                   "(pip install 'diffusion_model[benchmarks]')")
    p.add_argument("--size", choices=["small", "cifar", "both"], default="both",
                   help="6.47 M parameters, 35.75 M (DDPM's for CIFAR-10), or one after the other")
    p.add_argument("--rounds", type=int, default=5, help="turns of each variant (default: 5)")
    p.add_argument("--threads", type=int, help="of the CPU (default: every core there is)")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--json", metavar="FILE", help="write every measurement there, too")
    p.add_argument("--smoke", action="store_true",
                   help="tiny networks, one round: does all of it run? (some seconds)")
    return p


def settle(args: argparse.Namespace) -> argparse.Namespace:
    "Choose device and threads, and pin this process and those that it starts to the same cores."
    import torch
    if args.device == "auto": args.device = "cuda" if torch.cuda.is_available() else "cpu"
    here = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    cores = len(here) if here else os.cpu_count()
    args.threads = args.threads or (cores if args.device == "cpu" else min(cores, 4))
    if here and args.device == "cpu": os.sched_setaffinity(0, here[:args.threads])
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.smoke: args.size, args.rounds = "smoke", 1
    return args


def machine(args: argparse.Namespace) -> dict[str, Any]:
    "What a figure depends on."
    import torch
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    lines = {k.strip(): v.strip() for k, v in lines.items()}
    flags = lines.get("flags", lines.get("Features", "")).split()
    versions = {}
    for name in ("torch", "diffusers", "denoising-diffusion-pytorch", "smalldiffusion"):
        try: versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError: pass
    return {"cpu": lines.get("model name", platform.machine()), "threads": args.threads,
            "bf16": [f for f in flags if "bf16" in f] or "none",
            "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
            "versions": versions}


def say_machine(found: dict[str, Any]) -> None:
    bf16 = found["bf16"] if found["bf16"] == "none" else ", ".join(found["bf16"])
    print(f"{found['gpu'] or found['cpu']}, {found['threads']} threads, bf16 instructions: {bf16}; "
          + ", ".join(f"{k} {v}" for k, v in found["versions"].items()), flush=True)


def say_limits(limits: dict[str, float]) -> None:
    print("the machine's limit, GFLOP/s: "
          + ", ".join(f"{k} {v:,.0f}" for k, v in limits.items()), flush=True)


def table(head: list[str], rows: list[list[str]]) -> None:
    "A table that is Markdown, too."
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    def line(cells): return "| " + " | ".join(
        c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))) + " |"
    print(line(head))
    print("|" + "|".join("-"*(w + 1) + ("-" if i == 0 else ":")
                         for i, w in enumerate(widths)) + "|")
    for row in rows: print(line(row))
    print(flush=True)


def compared(players: list[Player], shipped: str, make) -> tuple[Player | None, Player | None]:
    "Whom ratios are taken to: the peer as shipped, and the peer at its best if that is another."
    base = next((p for p in players if p.variant.name == shipped and p.seconds), None)
    best = quickest([p for p in players if p.variant.make is make])
    return base, None if best is base else best


def say_failures(players: list[Player]) -> None:
    for p in players:
        if p.failed: print(f"{p.variant.name}: {p.failed}", flush=True)


def cell(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def row_of(p: Player) -> dict[str, Any]:
    "A variant's measurements, for the JSON."
    if p.failed or not p.seconds: return {"name": p.variant.name, "failed": p.failed or "no round"}
    return {"name": p.variant.name, "seconds": statistics.median(p.seconds),
            "rounds": p.seconds, "first": p.first, "images": p.work.images,
            "parameters": p.work.parameters, "flops": p.flops, "precision": p.work.precision,
            "peak": p.peak, "libraries": p.libraries}


def write(args: argparse.Namespace, found: dict[str, Any]) -> None:
    if args.json: Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
