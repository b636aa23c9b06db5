"""What does it cost to judge samples: time and memory; and beside the usual tools, on equal arrays?

10,000 and 2,000 grey images of 28×28 pixels are judged by all metrics through three eyes, in
processes of their own: once with an empty cache (features of 60,000 real images, and five floors),
once with a full one. Nothing is drawn by a model. Then FD, KID, precision, recall, density and
coverage of one pair of arrays, ours beside torch-fidelity's and prdc's, in turns. Five minutes on
two cores.

    python benchmarks/evaluation.py
"""
import contextlib, io, json, os, resource, statistics, subprocess, sys, tempfile, time

import torch


def judged(n: int, cache: str) -> dict:
    "Seconds and peak memory of judging n images, in this process."
    from pathlib import Path

    from diffusion_model.config import load_data_config
    from diffusion_model.dataset import create_dataset, draw_shapes
    from diffusion_model.judge import Images, create_judge
    from diffusion_model.transforms import as_channels
    data = load_data_config("quickstart", {"image_size": 28, "channels": 1, "test_size": 10_000})

    def read(first, last):  # a stream, as of a model or a folder
        for at in torch.arange(first, last).split(250):
            x, labels = draw_shapes(5, at, 28)
            yield as_channels(x, 1), labels
    samples = Images("drawn", n, (1, 28, 28), read)
    start = time.perf_counter()
    lines = create_judge(data, create_dataset(data), cache=Path(cache)).judge(samples)
    return {"seconds": time.perf_counter() - start, "lines": len(lines),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024}


def measure(n: int, cache: str) -> dict:
    "The same in a process of its own."
    done = subprocess.run([sys.executable, __file__, str(n), cache], text=True, check=True,
                          stdout=subprocess.PIPE, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1])


def alone() -> None:
    rows = {}
    for n in (2_000, 10_000):
        with tempfile.TemporaryDirectory() as cache:
            for name in ("empty", "full"): rows[n, name] = measure(n, cache)
    print(f"{'images':>8} {'cache':>6} {'seconds':>8} {'peak MB':>8}")
    for (n, name), row in rows.items():
        print(f"{n:8,} {name:>6} {row['seconds']:8.1f} {row['peak_mb']:8.0f}")
    for name in ("empty", "full"):
        ratio = rows[10_000, name]["peak_mb"]/rows[2_000, name]["peak_mb"]
        print(f"peak memory of 10,000 over that of 2,000, {name} cache: {ratio:.3f}")


def beside(n: int = 5_000, d: int = 64, times: int = 3) -> None:
    "Ours and the usual tools on the same features, in turns."
    from prdc import compute_prdc
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    from diffusion_model.evaluation import Evidence, fd, kid, score
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, d, generator=generator) for _ in range(2))
    statistics_of = fid_features_to_statistics
    one_subset = dict(kid_subsets=1, kid_subset_size=n, kid_kernel="poly", kid_kernel_poly_degree=3,
                      kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, verbose=False)
    four = ["precision", "recall", "density", "coverage"]
    pairs = {
        "FD": (lambda: fd(x, y), lambda: fid_statistics_to_metric(
            statistics_of(x), statistics_of(y), False)),
        "KID": (lambda: kid(x, y), lambda: kid_features_to_metric(x, y, **one_subset)),
        "four": (lambda: score(Evidence(x.clone(), y.clone()), four),
                 lambda: compute_prdc(x.numpy(), y.numpy(), 3))}
    print(f"\n{'':6} ours over theirs, {n:,} rows of {d}: median of {times}")
    for name, calls in pairs.items():
        seconds = ([], [])
        for _ in range(times):
            for call, found in zip(calls, seconds):
                start = time.perf_counter()
                with contextlib.redirect_stdout(io.StringIO()): call()
                found.append(time.perf_counter() - start)
        ratio = statistics.median(a/b for a, b in zip(*seconds))
        print(f"{name:6} {ratio:.2f}")


if __name__ == "__main__":
    if len(sys.argv) == 3: print(json.dumps(judged(int(sys.argv[1]), sys.argv[2])))
    else:
        alone()
        beside()
