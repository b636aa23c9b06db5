"Held against diffusers' schedulers: the same noise, the same predictions, step by step."
import importlib

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusion_model.oracle import GaussianMixture
from diffusion_model.sampler import solve
from diffusion_model.scheduler import (FlowSchedule, VPSchedule, cosine_betas, linear_betas,
                                       scaled_linear_betas, sigmoid_betas)

VP, FLOW = VPSchedule(linear_betas()), FlowSchedule()
MEANS = torch.tensor([[0.5, -0.3, 0.2], [-0.6, 0.4, 0.1], [0.1, 0.6, -0.7]])
START = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
BETAS = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


def fresh(name):
    return torch.randn(16, 3, generator=torch.Generator().manual_seed(sum(map(ord, name))))


def answer(pred, t, kind):
    "What a network of this kind would say."
    alpha, sigma = (c.float() for c in VP.alpha_sigma(t))
    return {"epsilon": pred.eps, "sample": pred.x0,
            "v_prediction": alpha*pred.eps - sigma*pred.x0}[kind]


def theirs(scheduler, monkeypatch, kind="epsilon", ve=False, **step):
    "diffusers' x after each step, in VP coordinates, and its grid with a clean end."
    module = importlib.import_module(type(scheduler).__module__)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: fresh(f"step {theirs.i}"))
    oracle, xs = GaussianMixture(VP, MEANS, std=0.2), []
    x = START*scheduler.init_noise_sigma
    if ve: x = START*((1 + scheduler.sigmas[0]**2)**0.5)
    grid = torch.tensor([int(t) for t in scheduler.timesteps] + [-1])
    levels = VP.levels(grid)
    for theirs.i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(answer(oracle(seen, t.long()), t.long(), kind), t, x, **step).prev_sample
        xs.append(x*levels[theirs.i + 1].alpha if ve else x)
    return xs, grid


def ours(grid, solver, **options):
    oracle = GaussianMixture(VP, MEANS, std=0.2)
    return [s.x for s in solve(oracle, START, grid, solver, draw=fresh, **options)][1:]


def same(a, b):
    for x, y in zip(a, b, strict=True): torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance, solver", [("fixed_small", "ddpm"),
                                              ("fixed_large", "ddpm_beta")])
@pytest.mark.parametrize("spacing, steps", [("leading", 10), ("trailing", 10), ("leading", 50)])
def test_ddpm(monkeypatch, variance, solver, kind, spacing, steps):
    scheduler = diffusers.DDPMScheduler(**BETAS, variance_type=variance, clip_sample=False,
                                        prediction_type=kind, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    xs, grid = theirs(scheduler, monkeypatch, kind)
    got = ours(grid, solver)
    if (variance, spacing) == ("fixed_large", "trailing"):
        # Theirs leaves the noise out at t = 0 only, which trailing never visits: its samples keep a
        # whole step's noise.
        kept = VP.alpha_sigma(grid[-2])[1].float()*fresh("step 9")
        torch.testing.assert_close(xs.pop(), got.pop() + kept, atol=1e-5, rtol=1e-5)
    same(xs, got)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0., 0.5, 1.])
@pytest.mark.parametrize("spacing, steps", [("leading", 10), ("trailing", 10), ("trailing", 50)])
def test_ddim(monkeypatch, eta, kind, spacing, steps):
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing=spacing,
                                        prediction_type=kind)
    scheduler.set_timesteps(steps)
    xs, grid = theirs(scheduler, monkeypatch, kind, eta=eta)
    same(xs, ours(grid, "ddim", eta=eta))


def test_ddim_where_the_steps_do_not_divide(monkeypatch):
    """Theirs steps from t to t - T//steps, whatever the next time is: with 7 trailing steps
    from 999 to 857, while the network is next asked about 856. Ours goes to the next time."""
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(7)
    xs, grid = theirs(scheduler, monkeypatch)
    assert grid[1] == 856 and 999 - 1000//7 == 857
    first = ours(torch.tensor([999, 857]), "ddim")[0]
    torch.testing.assert_close(xs[0], first, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(xs[0], ours(grid, "ddim")[0], atol=1e-5)


@pytest.mark.parametrize("spacing, steps", [("trailing", 10), ("linspace", 10), ("trailing", 40)])
def test_euler(monkeypatch, spacing, steps):
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    xs, grid = theirs(scheduler, monkeypatch, ve=True)
    same(xs, ours(grid, "euler"))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("algorithm, solver", [("dpmsolver++", "dpmpp_2m"),
                                               ("sde-dpmsolver++", "dpmpp_2m_sde")])
@pytest.mark.parametrize("spacing, steps", [("trailing", 10), ("linspace", 10), ("trailing", 40)])
def test_dpmpp_2m(monkeypatch, algorithm, solver, kind, spacing, steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, algorithm_type=algorithm,
                                                      timestep_spacing=spacing,
                                                      prediction_type=kind)
    scheduler.set_timesteps(steps)
    xs, grid = theirs(scheduler, monkeypatch, kind)
    same(xs, ours(grid, solver))


def test_unipc_differs_in_its_first_correction(monkeypatch):
    """UniPC (bh2) corrects its first step with the factor ½ where the integral gives φ1/(hφ0); from
    then on both use the parabola. So with a first step that is short the two agree, and the
    difference shrinks with its square."""
    scheduler = diffusers.UniPCMultistepScheduler(**BETAS, timestep_spacing="trailing",
                                                  final_sigmas_type="zero")
    scheduler.set_timesteps(500)
    xs, grid = theirs(scheduler, monkeypatch)
    for a, b in zip(xs, ours(grid, "unipc")): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spacing, steps", [("trailing", 10), ("linspace", 10), ("trailing", 40)])
def test_heun(spacing, steps):
    """HeunDiscrete is EDM's: slopes of x/α, averaged over σ/α; so is our `edm`. (Our `heun`
    averages those of x/(α+σ) over σ/(α+σ), which is FlowMatchHeun's, below.) It evaluates twice a
    step, but once for the last."""
    scheduler = diffusers.HeunDiscreteScheduler(**BETAS, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    grid = torch.cat([scheduler.timesteps.unique().flip(0).long(), torch.tensor([-1])])
    oracle, xs = GaussianMixture(VP, MEANS, std=0.2), []
    x = START*((1 + scheduler.sigmas[0]**2)**0.5)
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(oracle(seen, t.long()).eps, t, x).prev_sample
        xs.append(x)
    xs = [x*level.alpha for x, level in zip(xs[1::2] + xs[-1:], VP.levels(grid[1:]))]
    same(xs, ours(grid, "edm"))


@pytest.mark.parametrize("name, solver", [("Euler", "euler"), ("Euler", "ddim"), ("Heun", "heun")])
def test_flow(name, solver):
    scheduler = getattr(diffusers, f"FlowMatch{name}DiscreteScheduler")()
    scheduler.set_timesteps(12)
    oracle, x, xs = GaussianMixture(FLOW, MEANS, std=0.2), START, []
    for t in scheduler.timesteps:
        pred = oracle(x, t.double()/1000)
        x = scheduler.step(pred.eps - pred.x0, t, x).prev_sample
        xs.append(x)
    if name == "Heun":
        xs = xs[1::2] + xs[-1:]  # two evaluations for each step; the last has only one
    got = [s.x for s in solve(oracle, START, scheduler.sigmas.unique().flip(0).double(),
                              solver)][1:]
    same(xs, got)


@pytest.mark.parametrize("steps", [2, 3, 10])  # (with one step theirs starts at the least noise)
def test_karras_sigmas(steps):
    "Their karras spacing rounds times to whole ones; ours keeps the levels, which agree."
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    ratio = [s/a for a, s in VP.levels(VP.grid(steps, "karras"))]
    torch.testing.assert_close(torch.tensor(ratio), scheduler.sigmas, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name, betas", [("linear", linear_betas()),
                                         ("squaredcos_cap_v2", cosine_betas()),
                                         ("scaled_linear", scaled_linear_betas())])
def test_betas(name, betas):
    ends = {} if name == "squaredcos_cap_v2" else dict(beta_start=betas[0].item(),
                                                       beta_end=betas[-1].item())
    scheduler = diffusers.DDPMScheduler(1000, beta_schedule=name, **ends)
    torch.testing.assert_close(betas.float(), scheduler.betas, atol=1e-7, rtol=1e-5)


def test_betas_of_fewer_steps():
    "Theirs are not rescaled: 100 steps leave 36 % of the signal's variance, ours what 1000 do."
    left = diffusers.DDPMScheduler(**{**BETAS, "num_train_timesteps": 100}).alphas_cumprod[-1]
    assert abs(left - 0.36356) < 1e-5 and VPSchedule(linear_betas(100)).alphas_cumprod[-1] < 1e-4


def test_sigmoid_names_another_curve():
    "Theirs is a sigmoid of the betas, ours (Jabri et al. 2022) of the share of signal."
    theirs = diffusers.DDPMScheduler(1000, beta_schedule="sigmoid").alphas_cumprod[500]
    assert abs(VPSchedule(sigmoid_betas()).alphas_cumprod[500] - 0.5) < 0.01 and theirs < 0.3


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [1, 4, 7, 10, 50, 999, 1000])
def test_grids(spacing, steps):
    scheduler = diffusers.DDIMScheduler(**BETAS, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    grid = VP.grid(steps, spacing)[:-1]
    if (spacing, steps) == ("linspace", 1):  # theirs asks at the clean end
        assert scheduler.timesteps.tolist() == [0] and grid.tolist() == [999]
    elif (spacing, steps) == ("linspace", 7):
        # theirs rounds halves to even numbers: 832.5 is 832, ours 833
        assert (grid - scheduler.timesteps).tolist() == [0, 1, 0, 0, 0, 0, 0]
    else: torch.testing.assert_close(scheduler.timesteps, grid)


def test_zero_terminal_snr():
    scheduler = diffusers.DDIMScheduler(**BETAS, rescale_betas_zero_snr=True)
    mine = VPSchedule(linear_betas(), zero_terminal=True)
    torch.testing.assert_close(mine.alphas_cumprod.float(), scheduler.alphas_cumprod, atol=2e-6,
                               rtol=1e-4)
