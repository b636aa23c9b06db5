"""How far from the truth is each solver after 5, 10, 20 and 50 calls of the denoiser, and what does a step cost?

The denoiser is exact: a mixture of 8 Gaussians in 64 dimensions, so that every error is the solver's own. 4,096 samples;
the error is the Fréchet distance of their mean and covariance to the exact ones. Ours and diffusers' schedulers start from
the same noise, take the same levels and draw the same fresh noise. Then, over all settings that diffusers' samplers have,
the best at 10 calls is sought, and our default (which nobody set) is held against it. Last, what a step on a 1×4 tensor
costs, on one thread, ours and theirs in turn. Four minutes on two cores.

    python benchmarks/solvers.py [errors] [search] [speed]        default: all three
"""
import importlib
import inspect
import itertools
import math
import statistics
import sys
import time
import warnings

import diffusers
import torch

from diffusion_model.denoiser import Denoiser, Pred
from diffusion_model.oracle import GaussianMixture
from diffusion_model.sampler import (ddim_step, ddpm_step, dpmpp_2m_step, euler_step, heun_step, sample, solve)
from diffusion_model.scheduler import FlowSchedule, VESchedule, VPSchedule, linear_betas

N, D, CALLS, STD = 4096, 64, (5, 10, 20, 50), 0.22
MEANS = torch.randn(8, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)/2
START = torch.randn(N, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64).float()
VP, VE, FLOW = VPSchedule(linear_betas()), VESchedule(), FlowSchedule()
BETAS = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
TWICE = ("Heun", "KDPM2")  # two calls a step, but for the last


def oracle(schedule): return GaussianMixture(schedule, MEANS, std=STD)
def fresh(i): return torch.randn(N, D, generator=torch.Generator().manual_seed(100 + i))
def steps_for(calls, name): return (calls + 1)//2 if any(n in name for n in TWICE) else calls


def error(x):
    "Fréchet distance to the mixture's exact mean and covariance (Heusel et al. 2017, Eq. 6)."
    x, spread = x.double(), MEANS - MEANS.mean(0)
    exact = spread.T @ spread/8 + STD**2*torch.eye(D, dtype=torch.float64)
    found, root = torch.cov(x.T), torch.linalg.cholesky(exact)
    cross = torch.linalg.eigvalsh(root.T @ found @ root).clamp(min=0).sqrt().sum()
    return float((x.mean(0) - MEANS.mean(0)).square().sum() + exact.trace() + found.trace() - 2*cross)


def theirs(scheduler, family, steps):
    "Sample with one of diffusers' schedulers: x and the number of calls that it took."
    module, believe, at = importlib.import_module(type(scheduler).__module__), oracle(family), [0]
    if hasattr(module, "randn_tensor"): module.randn_tensor = lambda *a, **k: fresh(at[0])
    scheduler.set_timesteps(steps)
    x = START*float(getattr(scheduler, "init_noise_sigma", 1.))
    for at[0], t in enumerate(scheduler.timesteps):
        if family is VE:
            sigma = scheduler.sigmas[scheduler.index_for_timestep(t) if scheduler.step_index is None
                                     else scheduler.step_index].double()
            scheduler.scale_model_input(x, t)
            pred = believe(x.double(), sigma)
            skip = 0.25/(sigma**2 + 0.25)
            answer = (pred.x0 - skip*x)/(sigma*0.5/(sigma**2 + 0.25).sqrt())
        elif family is FLOW:
            pred = believe(x.double(), t.double()/1000)
            answer = pred.eps - pred.x0
        else:
            seen = scheduler.scale_model_input(x, t)
            answer = believe(seen.double(), t if not t.is_floating_point() else t.double()).eps
        x = scheduler.step(answer.float(), t, x).prev_sample
    return x, at[0] + 1


def levels_of(scheduler, family):
    "The times of our schedule at which this scheduler stands, once each, and the clean end."
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None: return torch.tensor([*scheduler.timesteps.tolist(), -1], dtype=torch.float64)
    sigmas = sigmas.double().unique().flip(0)
    sigmas = sigmas[sigmas > 0]
    if family is FLOW: return torch.cat([sigmas, torch.zeros(1)])
    t = family.t_of_log_snr(-2*sigmas.log())
    return torch.cat([t, torch.tensor([float(family.clean)])])


def ours(family, solver, grid):
    draw = lambda name: fresh(int(name.split()[1]))
    kind = torch.float32
    x = START*math.hypot(*family.levels(grid[:1])[0]) if family is not FLOW else START
    for state in solve(oracle(family), x.to(kind), grid, solver, draw=draw): pass
    return state.x


# (our solver, diffusers' class, its settings)
DPM, UNI = "DPMSolverMultistep", "UniPCMultistep"
PAIRS = {
    "VP": (VP, [
        ("ddpm", "DDPM", dict(timestep_spacing="trailing", clip_sample=False)),
        ("ddim", "DDIM", dict(clip_sample=False)),
        ("ddim", "DDIM", dict(clip_sample=False, timestep_spacing="trailing")),
        ("euler", "EulerDiscrete", {}),
        ("euler", "EulerDiscrete", dict(use_karras_sigmas=True)),
        ("heun", "HeunDiscrete", {}),
        ("heun", "HeunDiscrete", dict(timestep_spacing="trailing")),
        ("heun", "HeunDiscrete", dict(use_karras_sigmas=True)),
        ("dpmpp_2m", DPM, {}),
        ("dpmpp_2m", DPM, dict(use_karras_sigmas=True)),
        ("dpmpp_2m", DPM, dict(use_exponential_sigmas=True)),
        ("dpmpp_2m_sde", DPM, dict(algorithm_type="sde-dpmsolver++")),
        ("unipc", UNI, dict(final_sigmas_type="zero")),
        ("unipc", UNI, dict(final_sigmas_type="zero", use_exponential_sigmas=True))]),
    "VE": (VE, [
        ("euler", "EDMEuler", {}),
        ("euler", "EDMEuler", dict(sigma_schedule="exponential")),
        ("dpmpp_2m", "EDMDPMSolverMultistep", {}),
        ("dpmpp_2m", "EDMDPMSolverMultistep", dict(sigma_schedule="exponential")),
        ("dpmpp_2m_sde", "EDMDPMSolverMultistep", dict(algorithm_type="sde-dpmsolver++"))]),
    "flow": (FLOW, [
        ("euler", "FlowMatchEulerDiscrete", {}),
        ("heun", "FlowMatchHeunDiscrete", {}),
        ("dpmpp_2m", DPM, dict(use_flow_sigmas=True, prediction_type="flow_prediction")),
        ("unipc", UNI, dict(use_flow_sigmas=True, prediction_type="flow_prediction",
                            final_sigmas_type="zero"))]),
}


def make(name, family, settings):
    return getattr(diffusers, name + "Scheduler")(**(BETAS if family is VP else {}), **settings)


def row(name, values): print(f"{name:<66}" + "".join(f"{v:>9.4f}" for v in values), flush=True)


def errors():
    print("truth itself, a fresh sample of it:", round(error(oracle(VP).sample(N, seed=3)), 4))
    for title, (family, pairs) in PAIRS.items():
        print(f"\n{title:<66}" + "".join(f"{c:>9}" for c in CALLS))
        worst = 0.
        for solver, name, settings in pairs:
            a, b = [], []
            for calls in CALLS:
                scheduler = make(name, family, settings)
                x, used = theirs(scheduler, family, steps_for(calls, name))
                assert used <= calls
                a.append(error(x)), b.append(error(ours(family, solver, levels_of(scheduler, family))))
            told = ", ".join(str(v) for k, v in settings.items() if k not in ("clip_sample", "prediction_type")
                             and v is not True) or ""
            told = ", ".join(filter(None, [told, *(k for k, v in settings.items() if v is True)]))
            row(f"diffusers {name}{f' ({told})' if told else ''}", a)
            row(f"ours      {solver}, the same levels", b)
            worst = max(worst, *(y/x for x, y in zip(a, b)))
        print(f"ours over theirs, at worst: {worst:.4f}")
        row("ours, default (unipc, logit)", [error(sample(oracle(family), (N, D), n, noise=START*math.hypot(
            *family.levels(torch.tensor([family.noisy]))[0]))) for n in CALLS])
        row("the exact solution from the same noise (1,000 calls)", [error(ours(
            family, "dpmpp_2m", family.grid(1000, "logit")))])


def settings_of(cls):
    "All that can be chosen of a sampler in diffusers and could matter here."
    known = inspect.signature(cls.__init__).parameters
    kinds = {"solver_order": [1, 2, 3], "timestep_spacing": ["linspace", "leading", "trailing"],
             "final_sigmas_type": ["zero", "sigma_min"], "lower_order_final": [True, False],
             "euler_at_final": [False, True], "steps_offset": [0, 1], "set_alpha_to_one": [True, False],
             "algorithm_type": ["deis"] if "DEIS" in cls.__name__ else ["dpmsolver++", "dpmsolver"],
             "solver_type": ["midpoint", "heun"] if "DPM" in cls.__name__ else
             ["bh1", "bh2"] if "UniPC" in cls.__name__ else ["logrho"]}
    sigmas = [{}, *({k: True} for k in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas",
                                        "use_lu_lambdas") if k in known)]
    choices = [[(k, v) for v in vs] for k, vs in kinds.items() if k in known]
    for sigma, chosen in itertools.product(sigmas, itertools.product(*choices)): yield {**dict(chosen), **sigma}


def search(calls=10):
    "The best that any setting of any sampler in diffusers reaches on VP."
    found, refused = [], 0
    for name in ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "DPMSolverSinglestep", "EulerDiscrete",
                 "HeunDiscrete", "LMSDiscrete", "KDPM2Discrete", "DDIM", "PNDM"):
        for settings in settings_of(getattr(diffusers, name + "Scheduler")):
            try:
                x, used = theirs(make(name, VP, settings), VP, steps_for(calls, name))
            except (ValueError, NotImplementedError, IndexError, RuntimeError):  # settings that exclude each other
                refused += 1
                continue
            if used <= calls and x.isfinite().all(): found.append((error(x), name, settings))
    found.sort(key=lambda f: f[0])
    print(f"\n{len(found)} settings of diffusers at {calls} calls on VP ({refused} are refused); the best five:")
    for score, name, settings in found[:5]: print(f"{score:.4f}  {name} {settings}")
    own = error(sample(oracle(VP), (N, D), calls, noise=START))
    other = error(theirs(make(DPM, VP, {}), VP, 2*calls)[0])
    print(f"{own:.4f}  ours, default: {own/found[0][0]:.2f} × the best, "
          f"{own/other:.2f} × diffusers' default DPMSolverMultistep at {2*calls} ({other:.4f})")


def speed(steps=50, rounds=41):
    """A step: from the network's ε to the next x, conversions included. `heun` looks twice. A loop: all of `solve` around a
    network that answers at once, against `scale_model_input` and `step` (which they need), for a step of the grid."""
    torch.set_num_threads(1)
    eps, start, grid = torch.randn(1, 4), torch.randn(1, 4), VP.grid(steps, "trailing")
    levels, denoiser = VP.levels(grid), Denoiser(lambda x, t: eps, VP, "eps")
    draw = lambda name=None: torch.randn(1, 4)

    def read(x, here): return Pred(x.sub(eps, alpha=here.sigma)/here.alpha, eps)

    def step(solver):
        x, last = start, None
        for here, there in zip(levels, levels[1:]):
            pred = read(x, here)
            if solver == "ddpm": x = ddpm_step(x, pred, here, there, draw())
            elif solver == "ddim": x = ddim_step(x, pred, here, there)
            elif solver == "euler": x = euler_step(x, pred, here, there)
            elif solver == "heun": x = heun_step(x, pred, here, there, lambda x: read(x, there))
            else: x = dpmpp_2m_step(x, pred, here, there, last)
            last = pred, here

    def loop(solver):
        for _ in solve(denoiser, start, grid, solver, draw=draw): pass

    def their(name, scale):
        scheduler, x = make(name, VP, {}), start
        scheduler.set_timesteps(steps)
        times = list(scheduler.timesteps)
        begin = time.perf_counter()
        for t in times:
            if scale: scheduler.scale_model_input(x, t)
            x = scheduler.step(eps, t, x).prev_sample
        return time.perf_counter() - begin

    def timed(call, *args):
        begin = time.perf_counter()
        call(*args)
        return time.perf_counter() - begin

    print(f"\n{'µs for a step of the grid, 1×4 tensor':<40}{'ours':>8}{'theirs':>8}{'ratio':>7}"
          f"{'our loop':>11}{'theirs':>8}{'ratio':>7}")
    for solver, name in (("ddpm", "DDPM"), ("ddim", "DDIM"), ("dpmpp_2m", DPM), ("euler", "EulerDiscrete"),
                         ("heun", "HeunDiscrete")):
        runs = [(timed(step, solver), their(name, False), timed(loop, solver), their(name, True))
                for _ in range(rounds)]
        a, b, c, d = (statistics.median(r)/steps*1e6 for r in zip(*runs))
        print(f"{solver + ' / ' + name:<40}{a:>8.1f}{b:>8.1f}{a/b:>7.2f}{c:>11.1f}{d:>8.1f}{c/d:>7.2f}", flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    parts = {"errors": errors, "search": search, "speed": speed}
    for part in sys.argv[1:] or parts:
        if part not in parts: sys.exit(f"solvers: found '{part}'; known are {', '.join(parts)}")
        with torch.no_grad(): parts[part]()
