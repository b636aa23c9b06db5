"""How far from the truth is each solver after 5, 10, 20 and 50 function evaluations, and what does
a step cost?

The denoiser is exact: a mixture of 8 Gaussians in 64 dimensions, so that every error is the
solver's own. 4,096 samples; the error is the Fréchet distance of their mean and covariance to the
exact ones. Ours and diffusers' schedulers start from the same noise, take the same levels and draw
the same fresh noise. Where diffusers stands at levels between its whole times it gives the network
the nearest whole one; a further row shows what it reaches where the network is given the level
itself, which is then the same solver on the same grid. Then, over all settings that diffusers'
samplers have (some need scipy), the best at 10 evaluations is sought, and our default (which nobody
set) is held against it. Last, what a step on a 1×4 tensor costs, on one thread, ours and theirs in
turn. Ten minutes on two cores, most of it the search.

    python benchmarks/solvers.py [errors] [search] [speed]        default: all three
"""
import contextlib
import importlib
import inspect
import itertools
import math
import statistics
import sys
import time
import warnings
from functools import partial
from unittest import mock

import diffusers
import torch

from diffusion_model.denoiser import Denoiser, Pred
from diffusion_model.oracle import GaussianMixture
from diffusion_model.sampler import (Step, ddim_step, ddpm_step, dpmpp_2m_step, euler_step,
                                     heun_step, sample, solve)
from diffusion_model.scheduler import FlowSchedule, VESchedule, VPSchedule, linear_betas

N, D, CALLS, STD = 4096, 64, (5, 10, 20, 50), 0.22
MEANS = torch.randn(8, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)/2
START = torch.randn(N, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64).float()
VP, VE, FLOW = VPSchedule(linear_betas()), VESchedule(), FlowSchedule()
BETAS = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


def oracle(schedule): return GaussianMixture(schedule, MEANS, std=STD)
def fresh(i): return torch.randn(N, D, generator=torch.Generator().manual_seed(100 + i))
def calls_of(scheduler, steps):
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


def steps_for(make, calls):
    "The most steps that cost no more than so many calls: for some solvers a step is two, or more."
    return next((n for n in range(calls, 0, -1) if calls_of(make(), n) <= calls), None)


def error(x):
    "Fréchet distance to the mixture's exact mean and covariance (Heusel et al. 2017, Eq. 6)."
    x, spread = x.double(), MEANS - MEANS.mean(0)
    exact = spread.T @ spread/8 + STD**2*torch.eye(D, dtype=torch.float64)
    found, root = torch.cov(x.T), torch.linalg.cholesky(exact)
    cross = torch.linalg.eigvalsh(root.T @ found @ root).clamp(min=0).sqrt().sum()
    apart = (x.mean(0) - MEANS.mean(0)).square().sum()
    return float(apart + exact.trace() + found.trace() - 2*cross)


def theirs(scheduler, family, steps, exact=False):
    """Sample with one of diffusers' schedulers: x and the number of calls that it took. `exact`:
    the network is given the level that x is at, not a whole time near it."""
    module, denoise, at = importlib.import_module(type(scheduler).__module__), oracle(family), [0]
    our_noise = mock.patch.object(module, "randn_tensor", lambda *a, **k: fresh(at[0])) \
        if hasattr(module, "randn_tensor") else contextlib.nullcontext()
    scheduler.set_timesteps(steps)
    x = START*float(getattr(scheduler, "init_noise_sigma", 1.))
    for at[0], t in enumerate(scheduler.timesteps):
        if family is VE:
            sigma = scheduler.sigmas[scheduler.index_for_timestep(t) if scheduler.step_index is None
                                     else scheduler.step_index].double()
            scheduler.scale_model_input(x, t)
            pred = denoise(x.double(), sigma)
            skip = 0.25/(sigma**2 + 0.25)
            answer = (pred.x0 - skip*x)/(sigma*0.5/(sigma**2 + 0.25).sqrt())
        elif family is FLOW:
            pred = denoise(x.double(), level_at(scheduler, at[0]) if exact else t.double()/1000)
            answer = pred.eps - pred.x0
        else:
            seen = scheduler.scale_model_input(x, t)
            t_seen = t.double() if t.is_floating_point() else t
            if exact: t_seen = VP.t_of_log_snr(-2*level_at(scheduler, at[0]).log())
            answer = denoise(seen.double(), t_seen).eps
        with our_noise: x = scheduler.step(answer.float(), t, x).prev_sample
    return x, at[0] + 1


def level_at(scheduler, i): return torch.as_tensor(scheduler.sigmas[i]).double().cpu()


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
        ("edm", "HeunDiscrete", {}),
        ("heun", "HeunDiscrete", dict(timestep_spacing="trailing")),
        ("edm", "HeunDiscrete", dict(timestep_spacing="trailing")),
        ("heun", "HeunDiscrete", dict(use_karras_sigmas=True)),
        ("edm", "HeunDiscrete", dict(use_karras_sigmas=True)),
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
        shipped, same = 0., 0.
        for solver, name, settings in pairs:
            own = [k for k, v in settings.items() if v is True]  # levels of its own, between times
            shown = ", ".join([str(v) for k, v in settings.items()
                               if k not in ("clip_sample", "prediction_type")
                               and (v is not True or "sigmas" not in k)] + own)
            a, b, c = [], [], []
            for calls in CALLS:
                steps = steps_for(partial(make, name, family, settings), calls)
                scheduler = make(name, family, settings)
                x, used = theirs(scheduler, family, steps)
                assert used <= calls
                a.append(error(x))
                b.append(error(ours(family, solver, levels_of(scheduler, family))))
                if not own: continue
                x, _ = theirs(make(name, family, settings), family, steps, exact=True)
                c.append(error(x))
            row(f"diffusers {name}{f' ({shown})' if shown else ''}", a)
            if own: row("          the same, the network given the level itself", c)
            row(f"ours      {solver}, the same levels", b)
            row("          ours over theirs", [y/x for x, y in zip(c or a, b)])
            if (solver, name) == ("heun", "HeunDiscrete"): continue  # only by name: theirs is `edm`
            shipped = max(shipped, *(y/x for x, y in zip(a, b)))
            same = max(same, *(y/x for x, y in zip(c or a, b)))
        print(f"ours over theirs, the same solver and levels, at worst: {same:.4f} "
              f"(as shipped: {shipped:.4f})")
        size = math.hypot(*family.levels(torch.tensor([family.noisy]))[0])
        row("ours, default (unipc, logistic)",
            [error(sample(oracle(family), (N, D), n, noise=START*size)) for n in CALLS])
        row("the exact solution from the same noise (1,000 calls)", [error(ours(
            family, "dpmpp_2m", family.grid(1000, "logistic")))])


SEARCHED = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep",
            "SASolver", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete",
            "KDPM2AncestralDiscrete", "LMSDiscrete", "DDIM", "DDPM", "PNDM")


def settings_of(name):
    "All that can be chosen of a sampler in diffusers and could matter here."
    scheduler = getattr(diffusers, name + "Scheduler")
    known = inspect.signature(scheduler.__init__.__wrapped__).parameters
    dpm = ["dpmsolver++", "dpmsolver", "sde-dpmsolver++"]
    algorithms = {"DEISMultistep": ["deis"], "SASolver": ["data_prediction", "noise_prediction"]}
    kinds = {"solver_order": [1, 2, 3], "predictor_order": [1, 2, 3],
             "corrector_order": [0, 1, 2, 3],
             "timestep_spacing": ["linspace", "leading", "trailing"],
             "final_sigmas_type": ["zero", "sigma_min"], "lower_order_final": [True, False],
             "euler_at_final": [False, True], "steps_offset": [0, 1],
             "set_alpha_to_one": [True, False], "skip_prk_steps": [True, False],
             "predict_x0": [True, False], "disable_corrector": [[], [0], list(range(20))],
             "clip_sample": [False], "interpolation_type": ["linear", "log_linear"],
             "timestep_type": ["discrete", "continuous"],
             "variance_type": ["fixed_small", "fixed_large"] if name == "DDPM" else [None],
             "algorithm_type": algorithms.get(name, dpm),
             "solver_type": ["midpoint", "heun"] if "DPM" in name else
             ["bh1", "bh2"] if "UniPC" in name else ["logrho"]}
    grids = "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"
    sigmas = [{}, *({k: True} for k in grids if k in known)]
    choices = [[(k, v) for v in vs] for k, vs in kinds.items() if k in known]
    for sigma, chosen in itertools.product(sigmas, itertools.product(*choices)):
        yield {**dict(chosen), **sigma}


def key_of(name, settings, scheduler):
    "What is left of the settings once they have chosen the grid: the same key, the same samples."
    grid = ("timestep_spacing", "steps_offset", "interpolation_type", "timestep_type")
    rest = [(k, str(v)) for k, v in settings.items()
            if k not in grid and (v is not True or "sigmas" not in k)]
    sigmas = torch.as_tensor(getattr(scheduler, "sigmas", [])).tolist()
    return name, *rest, *scheduler.timesteps.tolist(), *sigmas


def search(calls=10):
    "The best that any setting of any sampler in diffusers reaches on VP."
    found, refused, missing, seen = [], 0, set(), set()
    for name in SEARCHED:
        for settings in settings_of(name):
            try:
                steps = steps_for(partial(make, name, VP, settings), calls)
                if steps is None: continue
                scheduler = make(name, VP, settings)
                scheduler.set_timesteps(steps)
                key = key_of(name, settings, scheduler)
                if key in seen: continue
                seen.add(key)
                x, used = theirs(make(name, VP, settings), VP, steps)
            except ImportError as e:
                missing.add(str(e))
                continue
            except (ValueError, NotImplementedError, IndexError, RuntimeError, AssertionError):
                refused += 1  # settings that exclude each other
                continue
            if used <= calls and x.isfinite().all(): found.append((error(x), name, settings))
    found.sort(key=lambda f: f[0])
    print(f"\n{len(found)} settings of diffusers at {calls} calls on VP "
          f"({refused} are refused by itself); the best five:")
    for score, name, settings in found[:5]: print(f"{score:.4f}  {name} {settings}")
    for name in SEARCHED:
        best = min((f for f in found if f[1] == name), key=lambda f: f[0], default=(math.nan,))
        print(f"    best of {name:<24}{best[0]:.4f}")
    for text in sorted(missing): print(f"not searched: {text}")
    own = error(sample(oracle(VP), (N, D), calls, noise=START))
    other = error(theirs(make(DPM, VP, {}), VP, 2*calls)[0])
    exact = error(ours(VP, "dpmpp_2m", VP.grid(1000)))
    print(f"{exact:.4f}  the exact solution from the same noise: the samples' own noise")
    print(f"{own:.4f}  ours, default: {own/found[0][0]:.2f} × the best, "
          f"{own/other:.2f} × diffusers' default DPMSolverMultistep at {2*calls} ({other:.4f})")


def speed(steps=50, rounds=41):
    """A step: from the network's ε to the next x, conversions included; `heun` evaluates twice. A
    loop: all of `solve` around a network that answers at once, against `scale_model_input` and
    `step` (which they need), for a step of the grid."""
    torch.set_num_threads(1)
    eps, start, grid = torch.randn(1, 4), torch.randn(1, 4), VP.grid(steps, "trailing")
    levels, denoiser = VP.levels(grid), Denoiser(lambda x, t, cond: eps, VP, "eps")
    draw = lambda name=None: torch.randn(1, 4)

    def read(x, here): return Pred(x.sub(eps, alpha=here.sigma)/here.alpha, eps)

    def step(solver):
        x, last = start, None
        for here, there in zip(levels, levels[1:]):
            pred = read(x, here)
            if solver == "ddpm": x = ddpm_step(x, pred, here, there, draw())
            elif solver == "ddim": x = ddim_step(x, pred, here, there)
            elif solver == "euler": x = euler_step(x, pred, here, there)
            elif solver == "heun": x = heun_step(x, pred, here, there, partial(read, here=there))
            else:
                last, x = Step(x, pred, here, there), dpmpp_2m_step(x, pred, here, there, last)

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
    for solver, name in (("ddpm", "DDPM"), ("ddim", "DDIM"), ("dpmpp_2m", DPM),
                         ("euler", "EulerDiscrete"), ("heun", "HeunDiscrete")):
        runs = [(timed(step, solver), their(name, False), timed(loop, solver), their(name, True))
                for _ in range(rounds)]
        a, b, c, d = (statistics.median(r)/steps*1e6 for r in zip(*runs))
        print(f"{solver + ' / ' + name:<40}{a:>8.1f}{b:>8.1f}{a/b:>7.2f}"
              f"{c:>11.1f}{d:>8.1f}{c/d:>7.2f}", flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    parts = {"errors": errors, "search": search, "speed": speed}
    for part in sys.argv[1:] or parts:
        if part not in parts: sys.exit(f"solvers: found '{part}'; known are {', '.join(parts)}")
        with torch.no_grad(): parts[part]()
