"""Does each shipped model draw 64 images within 20 seconds, and the same ones everywhere?

Each is drawn from by `diffusion-sample` in a process of its own, as a user does it, with Python's
start and all that is imported; the memory is that process's at most. Then 64 images are drawn anew
in other ways: on one thread, in other batches, and as other processors would, on which the
libraries below add up in another order (their own switches hide what this processor can do). For
each way, the table says by how many grey levels of 255 an image differs at most from the first way.

    python benchmarks/shipped.py [NAME ...] [--threads 2]        default: all of them
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from diffusion_model.config import list_models

# As a processor with fewer instructions: oneDNN's switch, torch's own, MKL's.
PLAIN = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default",
         "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
WAYS = {"1 thread, 64 at once": {}, "2 threads": {"threads": 2}, "as with SSE4": {"env": PLAIN},
        "as with AVX2": {"env": AVX2}, "without oneDNN": {"onednn": False},
        "7 at once": {"batch": 7}, "one at once": {"batch": 1}}


def time_command(name: str, threads: int) -> tuple[float, float]:
    "Seconds and gigabytes of `diffusion-sample --checkpoint NAME --num_samples 64`."
    code = "import sys; from diffusion_model.cli import sample_command; sys.exit(sample_command())"
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-c", code, "--checkpoint", name, "--num_samples", "64",
             "--output_dir", folder], stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        _, status, used = os.wait4(process.pid, 0)  # of this child alone
        process.returncode = os.waitstatus_to_exitcode(status)
        took = time.perf_counter() - start
    if process.returncode: sys.exit(f"{name}: diffusion-sample failed")
    kb = 1 if sys.platform == "darwin" else 1024
    return took, used.ru_maxrss*kb/1e9


def draw(name: str, threads: int, batch: int, onednn: bool) -> np.ndarray:
    "64 images, in this process."
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"tests"))  # for ship.py
    import ship
    import torch
    from diffusion_model import speed
    from diffusion_model.generation import load_denoiser
    torch.set_num_threads(threads)
    if not onednn:
        speed._packable = lambda *_: False
        torch._C._set_mkldnn_enabled(False)
    return ship.draw(load_denoiser(name), 64, ship.read_card(list_models()[name])["prompts"],
                     sample_batch_size=batch).numpy()


def drawn(
    name: str, threads: int = 1, batch: int = 64, onednn: bool = True, env: dict = None,
) -> np.ndarray:
    "The same in a process of its own, whose libraries are told what there is."
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "images.npy")
        words = json.dumps([name, threads, batch, onednn])
        subprocess.run([sys.executable, __file__, "--draw", words, str(file)], check=True,
                       env=os.environ | (env or {}))
        return np.load(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(list_models()))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draw", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.draw: return np.save(args.draw[1], draw(*json.loads(args.draw[0])))
    for name in args.names or list_models():
        took, memory = time_command(name, args.threads)
        print(f"{name}: 64 images in {took:.1f} s of 20 on {args.threads} threads, "
              f"{memory:.2f} GB at most", flush=True)
        first = None
        for way, how in WAYS.items():
            images = drawn(name, **how).astype(int)
            first = images if first is None else first
            apart = abs(images - first)
            print(f"  {way:24} {apart.max():3} grey levels at most, {(apart > 0).mean():.3%} of "
                  "all numbers differ", flush=True)


if __name__ == "__main__": main()
