"Facts that the schedule, the denoiser, the oracle and the samplers are held to."
import itertools, math

import pytest
import torch

from diffusion_model.config import DiffusionConfig, SamplingConfig
from diffusion_model.denoiser import PREDICTIONS, Denoiser, clamped, diffusion_loss
from diffusion_model.oracle import GaussianMixture
from diffusion_model.sampler import SOLVERS, create_sampler, ddim_step, guided, sample, sample_iter
from diffusion_model.scheduler import (SPACINGS, FlowSchedule, VPSchedule, cosine_betas, create_scheduler,
                                       linear_betas, scaled_linear_betas)

LINEAR, COSINE, FLOW = VPSchedule(linear_betas()), VPSchedule(cosine_betas()), FlowSchedule()
SCALED = VPSchedule(scaled_linear_betas())
ALL = {"linear": LINEAR, "scaled_linear": SCALED, "cosine": COSINE, "flow": FLOW}
f64 = dict(dtype=torch.float64)


# Fact 1
def test_ends_of_the_schedules():
    bar = LINEAR.alphas_cumprod
    assert math.isclose(bar[0], 0.9999, abs_tol=1e-12) and math.isclose(bar[-1], 4.035829765e-5, rel_tol=1e-9)
    ratio = ((1 - bar)/bar).sqrt()
    assert math.isclose(ratio.max(), 157.407, abs_tol=5e-4)
    assert math.isclose(SCALED.alphas_cumprod[-1], 0.004660098513, rel_tol=1e-9)
    assert math.isclose(((1 - SCALED.alphas_cumprod[-1])/SCALED.alphas_cumprod[-1])**0.5, 14.6146, abs_tol=5e-5)
    assert math.isclose(COSINE.alphas_cumprod[-1], 2.428766907e-9, rel_tol=1e-9)
    assert (COSINE.betas == 0.999).sum() == 1


# Fact 2
def test_betas_are_rescaled():
    assert math.isclose(VPSchedule(linear_betas(100)).alphas_cumprod[-1], 2.04e-5, rel_tol=3e-3)
    assert math.isclose((1 - torch.linspace(1e-4, 0.02, 100, **f64)).prod(), 0.36356, abs_tol=5e-6)
    with pytest.raises(ValueError, match="found 19"): linear_betas(19)
    with pytest.raises(ValueError, match="must stay below 1|each must lie"): VPSchedule(linear_betas(20))


@pytest.mark.parametrize("betas", [[0.], [1.], [0.1, 1.2], [-0.1], [float("nan")]])
def test_betas_outside_the_range(betas):
    with pytest.raises(ValueError, match="betas: found"): VPSchedule(torch.tensor(betas))


# Fact 3 (Bayes on a grid stands in the notebook)
@pytest.mark.parametrize("schedule", [LINEAR, SCALED, COSINE], ids=["linear", "scaled", "cosine"])
def test_posterior_identities(schedule):
    bar, prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    c1, c2, var = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2, schedule.posterior_variance
    assert torch.allclose(c1 + c2*bar.sqrt(), prev.sqrt(), atol=1e-12)
    assert torch.allclose(c2**2*(1 - bar) + var, 1 - prev, atol=1e-12)
    t = torch.arange(1000)
    x0, xt = torch.randn(1000, **f64), torch.randn(1000, **f64)
    mean, variance, log = schedule.posterior(x0, xt, t)
    assert torch.allclose(mean, c1*x0 + c2*xt, atol=1e-12) and torch.allclose(variance, var, atol=1e-12)
    assert log[0] == math.log(1e-20)


@pytest.mark.parametrize("name", ALL)
def test_posterior_composes(name):
    "Two steps back give the marginal of one."
    schedule = ALL[name]
    t, s = (torch.tensor([0.9]), torch.tensor([0.2])) if name == "flow" else (torch.tensor([900]), torch.tensor([200]))
    (at, st), (as_, ss) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    mean, var, _ = schedule.posterior(torch.ones(1, **f64), at.double(), t, s)  # from the mean of x_t
    slope = schedule.posterior(torch.zeros(1, **f64), torch.ones(1, **f64), t, s)[0]
    assert torch.allclose(mean, as_, atol=1e-10) and torch.allclose(slope**2*st**2 + var, ss**2, atol=1e-10)


def test_fractional_times():
    t = torch.tensor([400., 400.5, 401.], **f64)
    l = COSINE.log_snr(t)
    assert torch.allclose(l[[0, 2]], COSINE.log_snr(torch.tensor([400, 401])), atol=1e-12)
    assert torch.allclose(l[1], (l[0] + l[2])/2, atol=1e-10)
    assert [v.item() for v in COSINE.alpha_sigma(torch.tensor(-1.))] == [1., 0.]


@pytest.mark.parametrize("T, steps, spacing", list(itertools.product([20, 50, 999, 1000], [1, 2, 7, 20], SPACINGS)))
def test_grids(T, steps, spacing):
    grid = VPSchedule(linear_betas(1000)[:T]).grid(steps, spacing)
    assert len(grid) == steps + 1 and grid[-1] == -1 and (grid.diff() < 0).all() and grid[0] < T
    if spacing != "leading": assert grid[0] == T - 1


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range(steps):
    with pytest.raises(ValueError, match=f"found {steps}; allowed: 1 to 1000"): LINEAR.grid(steps)


def test_full_grid_has_all_times():
    for spacing in SPACINGS: assert LINEAR.grid(1000, spacing).tolist() == list(range(999, -2, -1))


def test_float32_follows_float64():
    x, e, t = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 10, 500, 999])
    assert LINEAR.add_noise(x, e, t).dtype == torch.float32
    assert torch.allclose(LINEAR.add_noise(x, e, t).double(), LINEAR.add_noise(x.double(), e.double(), t), atol=1e-6)


# Fact 9
@pytest.mark.parametrize("name, prediction", list(itertools.product(ALL, PREDICTIONS)))
def test_round_trip(name, prediction):
    schedule = ALL[name]
    if (name, prediction) == ("flow", "eps"):
        with pytest.raises(ValueError, match="choose"): Denoiser(None, schedule, prediction)
        return
    x0, e = torch.randn(2, 5, 3, **f64)
    t = torch.linspace(0.05, 0.95, 5) if name == "flow" else torch.tensor([0, 100, 300, 600, 900])
    denoiser = Denoiser(None, schedule, prediction)
    denoiser.network = lambda x, time: denoiser.target(x0, e, t)
    pred = denoiser(schedule.add_noise(x0, e, t), t)
    assert torch.allclose(pred.x0, x0, atol=1e-10) and torch.allclose(pred.eps, e, atol=1e-10)
    assert not diffusion_loss(denoiser, x0, e, t).any()


def test_weighted_losses_are_one_number():
    "The same wrong image, said in four languages, costs the same."
    x0, e, wrong = torch.randn(3, 6, 4, **f64)
    t = torch.tensor([5, 50, 200, 400, 600, 900])
    alpha, sigma = (c[:, None] for c in COSINE.alpha_sigma(t))
    x_t = COSINE.add_noise(x0, e, t)
    lie = (x_t - alpha*wrong)/sigma
    losses = []
    for prediction in PREDICTIONS:
        denoiser = Denoiser(None, COSINE, prediction)
        denoiser.network = lambda x, time: denoiser.target(wrong, lie, t)
        losses.append(diffusion_loss(denoiser, x0, e, t, weighting="min_snr", gamma=5.))
    by_hand = ((alpha/sigma)[:, 0]**2).clamp(max=5)*(wrong - x0).square().mean(1)
    for loss in losses: assert torch.allclose(loss, by_hand, rtol=1e-8)


def test_clamp_rederives_noise():
    far = Denoiser(lambda x, t: 9*torch.ones_like(x), COSINE, "x0")
    x, t = torch.randn(3, 2, **f64), torch.tensor([100, 500, 900])
    pred = clamped(far)(x, t)
    alpha, sigma = (c[:, None] for c in COSINE.alpha_sigma(t))
    assert (pred.x0 == 1).all() and torch.allclose(alpha*pred.x0 + sigma*pred.eps, x, atol=1e-12)


# Fact 4
def test_ddim_with_eta_one_has_ddpms_variance():
    levels = LINEAR.levels(torch.arange(1000))
    for t in range(1, 1000):
        here, there = levels[t], levels[t - 1]
        zero, one = torch.zeros(1, **f64), torch.ones(1, **f64)
        n = ddim_step(None, type("P", (), {"x0": zero, "eps": zero}), here, there, 1., one).item()
        assert math.isclose(n*n, LINEAR.posterior_variance[t], rel_tol=1e-8)
        h = math.log(there.alpha/there.sigma) - math.log(here.alpha/here.sigma)
        assert math.isclose(-there.sigma**2*math.expm1(-2*h), LINEAR.posterior_variance[t], rel_tol=1e-8)


# Fact 5
@pytest.mark.parametrize("data_variance, variance, ends_at", [(1., "beta", 1.), (1., "posterior", 0.99107), (0., "posterior", 0.)])
def test_ancestral_marginals(data_variance, variance, ends_at):
    "For Gaussian data the variance of DDPM's samples closes, step by step."
    v = torch.ones((), **f64)
    for t in range(999, -1, -1):
        a, s = LINEAR.alpha_sigma(torch.tensor(t))
        gain = a*data_variance/(a*a*data_variance + s*s)  # E[x_0 | x_t] = gain·x_t
        slope = LINEAR.posterior_mean_coef1[t]*gain + LINEAR.posterior_mean_coef2[t]
        noise = LINEAR.posterior_variance[t] if variance == "posterior" else LINEAR.betas[t]
        if data_variance == 0 and t == 0: noise = 0.
        v = slope**2*v + noise
    assert math.isclose(v.sqrt() if ends_at not in (0., 1.) else v, ends_at, abs_tol=2e-5) or \
        math.isclose(v, ends_at, abs_tol=2e-5)


# Fact 7
@pytest.mark.parametrize("name", ALL)
def test_one_path_in_all_coordinates(name):
    "On one log-SNR grid DDIM gives the same x/α, whatever the schedule."
    snr = torch.linspace(-8, 6, 12, **f64)
    ratio = (-snr/2).exp()  # σ/α
    flow_t = ratio/(1 + ratio)
    x_over_alpha = []
    for alpha in ((1 + ratio**2)**-0.5, torch.ones(12, **f64), 1 - flow_t):  # VP, VE, flow
        x = torch.tensor([1.3], **f64)*ratio[0]*alpha[0]
        for i in range(11):
            a, s, a2, s2 = alpha[i], alpha[i]*ratio[i], alpha[i + 1], alpha[i + 1]*ratio[i + 1]
            x0 = 0.3 + a*0.25/(a*a*0.25 + s*s)*(x - a*0.3)
            pred = type("P", (), {"x0": x0, "eps": (x - a*x0)/s})
            x = ddim_step(x, pred, (a.item(), s.item()), (a2.item(), s2.item()))
        x_over_alpha.append((x/alpha[-1]).item())
    assert max(x_over_alpha) - min(x_over_alpha) < 1e-10


def test_euler_is_ddim():
    for schedule in ALL.values():
        oracle = GaussianMixture(schedule, torch.tensor([[0.3, -0.2], [-0.5, 0.1]], **f64), std=0.2)
        start = torch.randn(5, 2, **f64)
        a, b = (sample(oracle, (5, 2), 13, solver=s, noise=start) for s in ("euler", "ddim"))
        assert torch.allclose(a, b, atol=1e-10)


# Fact 8
@pytest.mark.parametrize("prediction, total", [("eps", 172.0066), ("v", 52.5302)])
def test_golden(prediction, total):
    start = (torch.arange(768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)/768).float()
    network = lambda x, t: x*(t/(t + 1)).view(-1, 1, 1, 1)
    denoiser = Denoiser(None, LINEAR, prediction)
    denoiser.network = network
    out = sample(denoiser, start.shape, 10, spacing="leading", noise=start)
    assert math.isclose(out.abs().sum(), total, abs_tol=2e-3)


# Fact 10, the point mass
@pytest.mark.parametrize("name, solver, steps", list(itertools.product(ALL, SOLVERS, [1, 3, 20])))
def test_a_point_is_found_exactly(name, solver, steps):
    point = GaussianMixture(ALL[name], torch.tensor([[0.7, -0.4]], **f64))
    out = sample(point, (3, 2), steps, solver=solver, noise=torch.randn(3, 2, **f64))
    assert torch.allclose(out, point.means.expand(3, 2), atol=1e-9)


# Fact 11
def test_oracle_of_a_data_set():
    data = torch.randn(20, 3, **f64)
    oracle = GaussianMixture(COSINE, data)
    x = torch.randn(9, 3, **f64, requires_grad=True)
    for t in (50, 400, 900):
        t = torch.tensor(t)
        pred = oracle(x, t)
        single = torch.cat([oracle(x[i:i + 1], t).x0 for i in range(9)])
        assert torch.allclose(pred.x0, single, atol=1e-10)
        score, = torch.autograd.grad(oracle.log_prob(x, t).sum(), x)
        assert torch.allclose(pred.eps, -COSINE.alpha_sigma(t)[1]*score, atol=1e-8)
    each = oracle(x[:3], torch.tensor([50, 400, 900])).x0  # one time for each image
    rows = torch.cat([oracle(x[i:i + 1], t).x0 for i, t in enumerate(torch.tensor([50, 400, 900]))])
    assert torch.allclose(each, rows, atol=1e-8)


# Sampling
@pytest.mark.parametrize("solver", SOLVERS)
def test_batches_do_not_matter(solver):
    oracle = GaussianMixture(COSINE, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), std=0.3)
    whole = sample(oracle, (6, 3), 9, solver=solver, seed=5)
    parts = torch.cat([sample(oracle, (2, 3), 9, solver=solver, seed=5, first=i) for i in (0, 2, 4)])
    assert torch.allclose(whole, parts, atol=1e-5)
    assert torch.equal(whole, sample(oracle, (6, 3), 9, solver=solver, seed=5))
    assert not torch.equal(whole, sample(oracle, (6, 3), 9, solver=solver, seed=6))


def test_states_are_told():
    oracle = GaussianMixture(FLOW, torch.zeros(1, 2))
    states = list(sample_iter(oracle, (1, 2), 4))
    assert [s.step for s in states] == [0, 1, 2, 3, 4] and states[0].pred is None
    assert [s.t.item() for s in states] == [1., 0.75, 0.5, 0.25, 0.]


def test_the_network_is_put_back_to_training():
    class Net(torch.nn.Module):
        def forward(self, x, t):
            assert not self.training and not torch.is_grad_enabled()
            return x
    denoiser = Denoiser(Net(), COSINE, "v").train()
    sample(denoiser, (1, 2), 2)
    assert denoiser.network.training
    states = sample_iter(denoiser, (1, 2), 2)  # left in the middle
    next(states), states.close()
    assert denoiser.network.training


def test_guidance_is_one_call():
    calls = []
    oracle = GaussianMixture(COSINE, torch.eye(3), std=0.1, labels=torch.arange(3))
    def counted(x, t, y): calls.append(len(x)); return oracle(x, t, y)
    counted.schedule, counted.num_classes = COSINE, 3
    x, t, y = torch.randn(2, 3), torch.tensor(500), torch.tensor([0, 2])
    assert guided(counted, 1.) is counted
    pred = guided(counted, 3.)(x, t, y)
    assert calls == [4]
    by_hand = oracle(x, t, torch.tensor([-1, -1])).x0
    by_hand = by_hand + 3*(oracle(x, t, y).x0 - by_hand)
    assert torch.allclose(pred.x0, by_hand, atol=1e-5)


@pytest.mark.parametrize("options, says", [
    (dict(solver="hein"), "known are"), (dict(solver="eular"), "did you mean euler?"), (dict(spacing="x"), "known are trailing"),
    (dict(steps=0), "1 to 1000"), (dict(eta=2.), "0 \\(DDIM\\) to 1"), (dict(eta=.5, solver="ddpm"), "only 'ddim'"),
    (dict(y=torch.tensor([0])), "unconditional")])
def test_refusals(options, says):
    oracle = GaussianMixture(COSINE, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=says): sample(oracle, (1, 2), **options)


@pytest.mark.parametrize("y, says", [(None, "pass y"), (torch.tensor([3]), "found 3"), (torch.tensor([-2]), "found -2"),
                                     (torch.tensor([0, 1]), "one for each")])
def test_labels_refused(y, says):
    oracle = GaussianMixture(COSINE, torch.eye(3), labels=torch.arange(3))
    with pytest.raises(ValueError, match=says): sample(oracle, (1, 3), y=y)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine", "flow"])
def test_factories(schedule):
    made = create_scheduler(DiffusionConfig(schedule=schedule))
    oracle = GaussianMixture(made, torch.zeros(1, 2), std=5.)
    *_, last = create_sampler(SamplingConfig(steps=5))(oracle, (4, 2))
    assert last.x.abs().max() <= 1  # clamped to the data's range
    *_, last = create_sampler(SamplingConfig(steps=5, clip_x0=False))(oracle, (4, 2))
    assert last.x.abs().max() > 1
