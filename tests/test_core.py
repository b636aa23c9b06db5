"Facts that the schedule, the denoiser, the oracle and the samplers are held to."
import itertools, math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hypothesis import given, settings, strategies as st

from diffusion_model.config import DiffusionConfig, SamplingConfig
from diffusion_model.counters import counter_normal
from diffusion_model.denoiser import (PREDICTIONS, WEIGHTINGS, Denoiser, clamped, diffusion_loss,
                                      loss_weight, thresholded)
from diffusion_model.editing import image_to_image, inpaint, interpolate, invert, slerp
from diffusion_model.guidance import drop_cond, guided
from diffusion_model.oracle import GaussianMixture
from diffusion_model.sampler import (SOLVERS, Churn, create_sampler, ddim_step, renoise, sample,
                                     sample_iter, solve)
from diffusion_model.scheduler import (SPACINGS, TIMESTEPS, FlowSchedule, VESchedule, VPSchedule,
                                       cosine_betas, create_scheduler, linear_betas,
                                       scaled_linear_betas, sigmoid_betas)

LINEAR, COSINE = VPSchedule(linear_betas()), VPSchedule(cosine_betas())
FLOW, VE = FlowSchedule(), VESchedule()
SCALED, SIGMOID = VPSchedule(scaled_linear_betas()), VPSchedule(sigmoid_betas())
ZERO = VPSchedule(linear_betas(), zero_terminal=True)
ALL = {"linear": LINEAR, "scaled_linear": SCALED, "cosine": COSINE, "sigmoid": SIGMOID,
       "zero": ZERO, "flow": FLOW, "ve": VE}
f64 = dict(dtype=torch.float64)


def has(schedule, spacing): return schedule.T or spacing != "leading"


# Fact 1
def test_ends_of_the_schedules():
    bar = LINEAR.alphas_cumprod
    assert math.isclose(bar[0], 0.9999, abs_tol=1e-12)
    assert math.isclose(bar[-1], 4.035829765e-5, rel_tol=1e-9)
    ratio = ((1 - bar)/bar).sqrt()
    assert math.isclose(ratio.max(), 157.407, abs_tol=5e-4)
    assert math.isclose(SCALED.alphas_cumprod[-1], 0.004660098513, rel_tol=1e-9)
    assert math.isclose(((1 - SCALED.alphas_cumprod[-1])/SCALED.alphas_cumprod[-1])**0.5, 14.6146,
                        abs_tol=5e-5)
    assert math.isclose(COSINE.alphas_cumprod[-1], 2.428766907e-9, rel_tol=1e-9)
    assert (COSINE.betas == 0.999).sum() == 1


# Fact 2
def test_betas_are_rescaled():
    assert math.isclose(VPSchedule(linear_betas(100)).alphas_cumprod[-1], 2.04e-5, rel_tol=3e-3)
    assert math.isclose((1 - torch.linspace(1e-4, 0.02, 100, **f64)).prod(), 0.36356, abs_tol=5e-6)
    with pytest.raises(ValueError, match="found 19"): linear_betas(19)
    with pytest.raises(ValueError, match="found 20; .*reach 1"): linear_betas(20)
    VPSchedule(linear_betas(21))


@pytest.mark.parametrize("betas", [[0.], [1.], [0.1, 1.2], [-0.1], [float("nan")]])
def test_betas_outside_the_range(betas):
    with pytest.raises(ValueError, match="betas: found"): VPSchedule(torch.tensor(betas))


# Fact 3 (Bayes on a grid stands in the notebook)
@pytest.mark.parametrize("schedule", [LINEAR, SCALED, COSINE, SIGMOID, ZERO],
                         ids=["linear", "scaled", "cosine", "sigmoid", "zero"])
def test_posterior_identities(schedule):
    bar, prev = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    c1, c2 = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
    var = schedule.posterior_variance
    assert torch.allclose(c1 + c2*bar.sqrt(), prev.sqrt(), atol=1e-12)
    assert torch.allclose(c2**2*(1 - bar) + var, 1 - prev, atol=1e-12)
    t = torch.arange(1000)
    x0, xt = torch.randn(1000, **f64), torch.randn(1000, **f64)
    mean, variance, log = schedule.posterior(x0, xt, t)
    assert torch.allclose(mean, c1*x0 + c2*xt, atol=1e-12)
    assert torch.allclose(variance, var, atol=1e-12)
    assert log[0] == math.log(1e-20)


@pytest.mark.parametrize("name", ALL)
def test_posterior_composes(name):
    "Two steps back give the marginal of one."
    schedule = ALL[name]
    t, s = (torch.tensor([n if schedule.T else n/1000]) for n in (900, 200))
    (at, st), (as_, ss) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    # from the mean of x_t
    mean, var, _ = schedule.posterior(torch.ones(1, **f64), at.double(), t, s)
    slope = schedule.posterior(torch.zeros(1, **f64), torch.ones(1, **f64), t, s)[0]
    assert torch.allclose(mean, as_, atol=1e-10)
    assert torch.allclose(slope**2*st**2 + var, ss**2, atol=1e-10)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, ZERO])
def test_fractional_times(schedule):
    t = torch.tensor([997.9, 998., 998.5, 999.], **f64)
    alpha, sigma = schedule.alpha_sigma(t)
    whole = schedule.alpha_sigma(torch.tensor([998, 999]))
    assert torch.equal(alpha[[1, 3]], whole[0]) and torch.equal(sigma[[1, 3]], whole[1])
    angle = torch.atan2(sigma, alpha)
    assert torch.allclose(angle[2], (angle[1] + angle[3])/2, atol=1e-12) and angle[0] < angle[1]
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(4, **f64))
    assert [v.item() for v in schedule.alpha_sigma(torch.tensor(-1.))] == [1., 0.]


@pytest.mark.parametrize("name", ALL)
def test_time_of_a_level(name):
    schedule = ALL[name]
    t = torch.linspace(0.01, 0.99, 57, **f64)*schedule.noisy
    assert torch.allclose(schedule.t_of_log_snr(schedule.log_snr(t)), t, rtol=1e-6)
    inf = torch.tensor([-math.inf], **f64)
    if name in ("flow", "zero"): assert schedule.t_of_log_snr(inf) == schedule.noisy


def test_sigmoid_is_of_the_signal():
    "Jabri et al. 2022, Algorithm 1, by its own formula."
    tau = torch.linspace(0, 1, 1001, **f64)[1:-1]
    v = torch.sigmoid(-(tau*6 - 3))
    low, high = torch.sigmoid(torch.tensor([-3., 3.], **f64))
    assert torch.allclose(SIGMOID.alphas_cumprod[:-1], (v - low)/(high - low), atol=1e-10)


@pytest.mark.parametrize("name, how", list(itertools.product(ALL, TIMESTEPS)))
def test_times_for_training(name, how):
    schedule, u = ALL[name], (torch.arange(20_000) + 0.5)/20_000
    t = schedule.sample_timesteps(u, how)
    assert t.dtype == (torch.int64 if schedule.T else torch.float32) and (t.diff() >= 0).all()
    assert (t > schedule.clean).all() and (t <= schedule.noisy).all()
    if how == "log_normal":  # the same noise on all schedules, as far as they reach
        alpha, sigma = schedule.alpha_sigma(t)
        assert abs((sigma/alpha).log().median() + 1.2) < 0.05
    ends = schedule.sample_timesteps(torch.tensor([0., 1 - 2**-24]), how)
    assert ends.isfinite().all() and ends[0] <= ends[1]


def test_time_sampling_refused():
    with pytest.raises(ValueError, match="found 'x'; known are uniform"):
        LINEAR.sample_timesteps(torch.rand(2), "x")


@pytest.mark.parametrize("low, high", [(0., 1.), (2., 1.), (1., math.inf)])
def test_ve_ends_refused(low, high):
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"): VESchedule(low, high)


@pytest.mark.parametrize("T, steps, spacing",
                         list(itertools.product([20, 50, 999, 1000], [1, 2, 7, 20], SPACINGS)))
def test_grids(T, steps, spacing):
    grid = VPSchedule(linear_betas(1000)[:T]).grid(steps, spacing)
    assert len(grid) == steps + 1 and grid[-1] == -1 and (grid.diff() < 0).all() and grid[0] < T
    if spacing != "leading": assert grid[0] == T - 1


# Fact 10
@pytest.mark.parametrize("name, spacing", list(itertools.product(ALL, SPACINGS)))
def test_a_full_grid_falls_and_ends_clean(name, spacing):
    schedule = ALL[name]
    if not has(schedule, spacing):
        with pytest.raises(ValueError, match="choose 'trailing'"): schedule.grid(5, spacing)
        return
    for steps in (1, 2, 999, 1000):
        grid = schedule.grid(steps, spacing)
        assert len(grid) == steps + 1 and (grid.diff() < 0).all() and grid[-1] == schedule.clean
        levels = schedule.levels(grid)
        assert levels[-1] == (1, 0)
        assert all(a.sigma*b.alpha > b.sigma*a.alpha for a, b in itertools.pairwise(levels))


def test_zero_terminal_snr():
    assert ZERO.alphas_cumprod[-1] == 0
    assert torch.isclose(ZERO.alphas_cumprod[0], LINEAR.alphas_cumprod[0], atol=1e-15)
    with pytest.raises(ValueError, match="choose 'v'"): Denoiser(None, ZERO, "eps")
    with pytest.raises(ValueError, match="at least 2"): VPSchedule([0.1], zero_terminal=True)
    x = torch.randn(4, 3, **f64)
    for prediction in ("v", "x0", "flow", "edm"):
        pred = Denoiser(lambda x, t, cond: 0.3*x, ZERO, prediction)(x, torch.tensor(999))
        assert pred.x0.isfinite().all() and pred.eps.isfinite().all()


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range(steps):
    with pytest.raises(ValueError, match=f"found {steps}; allowed: 1 to 1000"): LINEAR.grid(steps)


def test_full_grid_has_all_times():
    for spacing in ("trailing", "leading", "linspace"):
        assert LINEAR.grid(1000, spacing).tolist() == list(range(999, -2, -1))


def test_float32_follows_float64():
    x, e, t = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 10, 500, 999])
    assert LINEAR.add_noise(x, e, t).dtype == torch.float32
    assert torch.allclose(LINEAR.add_noise(x, e, t).double(),
                          LINEAR.add_noise(x.double(), e.double(), t), atol=1e-6)


# Fact 9
@pytest.mark.parametrize("name, prediction", list(itertools.product(ALL, PREDICTIONS)))
def test_round_trip(name, prediction):
    schedule = ALL[name]
    if name in ("flow", "zero") and prediction == "eps":
        with pytest.raises(ValueError, match="choose"): Denoiser(None, schedule, prediction)
        return
    x0, e = torch.randn(2, 5, 3, **f64)
    t = torch.tensor([0, 100, 300, 600, 900]) if schedule.T else torch.linspace(0.05, 0.95, 5)
    denoiser = Denoiser(None, schedule, prediction)
    denoiser.network = lambda x, time, cond: denoiser.target(x0, e, t)
    pred = denoiser(schedule.add_noise(x0, e, t), t)
    assert torch.allclose(pred.x0, x0, atol=1e-10) and torch.allclose(pred.eps, e, atol=1e-10)
    assert not diffusion_loss(denoiser, x0, e, t).any()


@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w != "uniform"])
def test_weighted_losses_are_one_number(weighting):
    "The same wrong image, said in five languages, costs the same."
    x0, e, wrong = torch.randn(3, 6, 4, **f64)
    t = torch.tensor([5, 50, 200, 400, 600, 900])
    alpha, sigma = (c[:, None] for c in COSINE.alpha_sigma(t))
    x_t = COSINE.add_noise(x0, e, t)
    lie, snr = (x_t - alpha*wrong)/sigma, (alpha/sigma)[:, 0]**2
    w = {"min_snr": snr.clamp(max=5),
         "edm": (sigma**2 + alpha**2/4)[:, 0]/(alpha*sigma/2)[:, 0]**2*alpha[:, 0]**2,
         "sigmoid": snr/(1 + snr*math.exp(-2))}[weighting]
    for prediction in PREDICTIONS:
        denoiser = Denoiser(None, COSINE, prediction)
        target = denoiser.target(wrong, lie, t)
        denoiser.network = lambda x, time, cond, target=target: target
        loss = diffusion_loss(denoiser, x0, e, t, weighting=weighting)
        assert torch.allclose(loss, w*(wrong - x0).square().mean(1), rtol=1e-8)


def test_edm_is_minus_v_and_has_weight_one():
    t = torch.arange(1, 1000)
    alpha, sigma = COSINE.alpha_sigma(t)
    for edm, v in zip(PREDICTIONS["edm"](alpha, sigma, 1.), PREDICTIONS["v"](alpha, sigma, 1.)):
        assert torch.allclose(edm, -v, atol=1e-12)
    for schedule, times in ((COSINE, t), (VE, torch.logspace(-2, 1.9, 50, **f64))):
        weight = loss_weight(Denoiser(None, schedule, "edm"), times, "edm")
        assert torch.allclose(weight, torch.ones(len(times), **f64))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_inputs_of_ve_are_scaled(prediction):
    "80 times the noise must not reach the network as 80, nor half the noise as half."
    for sigma in (80., 0.5):
        seen = []
        note = lambda x, t, cond, seen=seen: seen.append((x, t)) or 0*x
        denoiser = Denoiser(note, VE, prediction)
        denoiser(torch.ones(500, 3), torch.tensor(sigma))
        (shown, time), = seen
        assert torch.allclose(shown, torch.tensor((sigma**2 + 0.25)**-0.5).expand(500, 3))
        wanted = 1000*math.log(sigma/0.002)/math.log(40_000)
        assert abs(time[0] - wanted) < 1e-2 and len(time) == 500


def test_weighting_refused():
    with pytest.raises(ValueError, match="found 'x'; known are uniform"):
        loss_weight(Denoiser(None, COSINE, "v"), torch.tensor([3]), "x")


def test_thresholding():
    wide = torch.linspace(-3, 3, 101, **f64).repeat(2, 1)
    far = Denoiser(lambda x, t, cond: wide, COSINE, "x0")
    x, t = torch.randn(2, 101, **f64), torch.tensor([100, 900])
    for share in (1., 0.8, 0.5):
        pred = thresholded(far, share)(x, t)
        limit = wide[0].abs().sort().values[math.ceil(share*101) - 1].clamp(min=1)
        assert torch.allclose(pred.x0, (wide/limit).clamp(-1, 1))
        alpha, sigma = (c[:, None] for c in COSINE.alpha_sigma(t))
        assert torch.allclose(alpha*pred.x0 + sigma*pred.eps, x, atol=1e-12)
    inside = Denoiser(lambda x, t, cond: wide/4, COSINE, "x0")
    assert torch.allclose(thresholded(inside)(x, t).x0, wide/4)  # nothing to do
    grey = thresholded(far, 1., low=0., high=1.)(x, t).x0
    # -3 … 3 is at most 3.5 from the middle, 7 half ranges
    assert grey.min() == 0 and abs(grey.max() - 6/7) < 1e-12


def test_clamp_rederives_noise():
    far = Denoiser(lambda x, t, cond: 9*torch.ones_like(x), COSINE, "x0")
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
        assert math.isclose(-there.sigma**2*math.expm1(-2*h), LINEAR.posterior_variance[t],
                            rel_tol=1e-8)


# Fact 5
def ancestral(data_variance, noise):
    "For data N(0, v) the variance of DDPM's samples closes: it, and the true one, after each step."
    a, b = LINEAR.alpha_sigma(torch.arange(1000))
    v = a[999]**2*data_variance + b[999]**2
    for t in range(999, -1, -1):
        gain = a[t]*data_variance/(a[t]**2*data_variance + b[t]**2)  # E[x_0 | x_t] = gain·x_t
        left = data_variance*(1 - a[t]*gain)                         # Var(x_0 | x_t)
        slope = LINEAR.posterior_mean_coef1[t]*gain + LINEAR.posterior_mean_coef2[t]
        v = slope**2*v + noise(t, left)
        left = LINEAR.alphas_cumprod_prev[t]
        yield v.item(), (left*data_variance + 1 - left).item()


PAIRS = {"a point, β̃": (0., lambda t, left: LINEAR.posterior_variance[t]),
         "standard normal, β": (1., lambda t, left: LINEAR.betas[t]),
         **{f"any Gaussian ({d}), β̃ + c1²·Var(x_0|x_t)":
            (d, lambda t, left: LINEAR.posterior_variance[t]
             + LINEAR.posterior_mean_coef1[t]**2*left)
            for d in (0.04, 0.25, 1., 3.)}}


@pytest.mark.parametrize("pair", PAIRS)
def test_ancestral_marginals_are_exact(pair):
    for got, true in ancestral(*PAIRS[pair]):
        assert math.isclose(got, true, rel_tol=1e-10, abs_tol=1e-12)


def test_the_wrong_variance_is_seen():
    *_, (got, true) = ancestral(1., lambda t, left: LINEAR.posterior_variance[t])
    assert true == 1 and math.isclose(got, 0.99107, abs_tol=5e-6)


# Fact 7
def test_one_path_in_all_coordinates():
    "On one log-SNR grid DDIM gives the same x/α, whatever the schedule."
    snr, ends = torch.linspace(-5, 6, 12, **f64), {}
    for name, schedule in ALL.items():
        grid = schedule.t_of_log_snr(snr)
        bell = GaussianMixture(schedule, torch.tensor([[0.3]], **f64), std=0.5)
        *_, end = solve(bell, torch.tensor([[1.3]], **f64)*schedule.alpha_sigma(grid[0])[0], grid,
                        "ddim")
        ends[name] = (end.x/schedule.alpha_sigma(grid[-1])[0]).item()
    assert max(ends.values()) - min(ends.values()) < 1e-10


def test_euler_is_ddim():
    for schedule in ALL.values():
        oracle = GaussianMixture(schedule, torch.tensor([[0.3, -0.2], [-0.5, 0.1]], **f64), std=0.2)
        start = torch.randn(5, 2, **f64)
        a, b = (sample(oracle, (5, 2), 13, solver=s, noise=start) for s in ("euler", "ddim"))
        assert torch.allclose(a, b, atol=1e-9)


# Fact 6
def exact_end(schedule, grid, x, mu, v):
    (alpha, sigma), (a, u) = schedule.levels(grid)[0], schedule.levels(grid)[-1]
    return a*mu + (x - alpha*mu)*math.sqrt((a*a*v + u*u)/(alpha*alpha*v + sigma*sigma))


class Circle(FlowSchedule):
    "VP without the corners of a table."
    def alpha_sigma(self, t): return (t.double()*math.pi/2).cos(), (t.double()*math.pi/2).sin()
    def t_of_log_snr(self, l): return torch.atan((-l/2).exp())*2/math.pi


SMOOTH = Circle()


def uneven(schedule, steps):
    "σ/α from 20 to 0.05: denser in places, and strides long and short by turns."
    k = torch.linspace(0, 1, steps + 1, **f64)
    k = k + 0.1*torch.sin(2*math.pi*k)
    k[1:-1:2] += 0.2/steps
    return schedule.t_of_log_snr(-2*(math.log(20) + k*math.log(0.05/20)))


@pytest.mark.parametrize("solver, order", [("ddim", 1), ("euler", 1), ("heun", 2), ("edm", 2),
                                           ("dpmpp_2m", 2),
                                           ("unipc", 3)])
@pytest.mark.parametrize("schedule", [SMOOTH, FLOW, VE], ids=["vp", "flow", "ve"])
def test_orders(schedule, solver, order):
    "On an uneven grid that stops above zero."
    bell = GaussianMixture(schedule, torch.tensor([[0.3]], **f64), std=0.5)
    x = torch.tensor([[1.2], [-0.7]], **f64)
    errors = []
    for n in (32, 64, 128, 256, 512):
        grid = uneven(schedule, n)
        *_, end = solve(bell, x, grid, solver)
        errors.append((end.x - exact_end(schedule, grid, x, 0.3, 0.25)).abs().max().item())
    orders = [math.log2(a/b) for a, b in zip(errors, errors[1:])]
    assert abs(orders[0] - order) < 0.1 and abs(orders[-1] - order) < 0.012, orders


def test_the_grid_catches_a_careless_2m():
    "Without the ratio of the strides 2M is of first order; an even or smooth grid hides it."
    bell = GaussianMixture(FLOW, torch.tensor([[0.3]], **f64), std=0.5)
    x, errors = torch.tensor([[1.2]], **f64), []
    for grid in (uneven(FLOW, 256), uneven(FLOW, 512)):
        levels, at, last = FLOW.levels(grid), x, None
        for t, (alpha, sigma), (a, u) in zip(grid, levels, levels[1:]):
            guess = bell(at, t).x0
            middle = guess if last is None else guess + (guess - last)/2
            at, last = u/sigma*at + a*(1 - alpha*u/(a*sigma))*middle, guess
        errors.append((at - exact_end(FLOW, grid, x, 0.3, 0.25)).abs().item())
    assert math.log2(errors[0]/errors[1]) < 1.1


def test_the_step_of_edm_goes_up_first():
    x, z = torch.randn(100_000, **f64), torch.randn(100_000, **f64)
    here, there = COSINE.levels(torch.tensor([300, 500]))
    up = renoise(here.alpha*0.4 + here.sigma*x, here, there, z)
    assert abs(up.mean() - there.alpha*0.4) < 4*there.sigma/100_000**0.5
    assert abs(up.var() - there.sigma**2) < 4*there.sigma**2*(2/100_000)**0.5


@pytest.mark.parametrize("name", ALL)
def test_churn_stays_inside_its_limits(name):
    schedule = ALL[name]
    grid = schedule.grid(20)
    raised = Churn(40., 0.1, 5.).raised(schedule, grid)
    ratio, up = ([s/a if a else math.inf for a, s in schedule.levels(g)]
                 for g in (grid[:-1], raised))
    gamma = min(40/20, 2**0.5 - 1)
    for r, r_up in zip(ratio, up):
        assert math.isclose(r_up, r*(1 + gamma) if 0.1 <= r <= 5 else r, rel_tol=1e-6)


# Fact 8
@pytest.mark.parametrize("prediction, total", [("eps", 172.0066), ("v", 52.5302)])
def test_golden(prediction, total):
    start = (torch.arange(768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)/768).float()
    network = lambda x, t, cond: x*(t/(t + 1)).view(-1, 1, 1, 1)
    denoiser = Denoiser(None, LINEAR, prediction)
    denoiser.network = network
    out = sample(denoiser, start.shape, 10, solver="ddim", spacing="leading", noise=start)
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


def test_no_network_is_better_than_the_oracle():
    "The loss by quadrature: no change of the answer lowers it, and training only comes near."
    data, t = torch.tensor([[-0.8], [0.1], [0.9]], **f64), torch.tensor(500)
    oracle, (alpha, sigma) = GaussianMixture(COSINE, data), COSINE.alpha_sigma(t)
    x = torch.linspace(-5, 5, 2001, **f64)[:, None]
    p = torch.exp(-(x - alpha*data.T)**2/(2*sigma**2))  # (x, point)
    p /= p.sum()
    loss = lambda guess: (p*(guess - data.T)**2).sum()
    floor = loss(oracle(x, t).x0)
    for name in ("a", "b", "c"):
        change = counter_normal(0, name, torch.arange(2001), (1,)).double()
        for size in (0.1, -0.1, 1e-3): assert loss(oracle(x, t).x0 + size*change) > floor
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(),
                              torch.nn.Linear(16, 1)).double()
    adam, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(300):
        losses.append(loss(net(x)))
        losses[-1].backward(), adam.step(), adam.zero_grad()
    assert min(losses) > floor and losses[-1] < 1.01*floor


# Sampling
@pytest.mark.parametrize("solver", SOLVERS)
def test_batches_do_not_matter(solver):
    oracle = GaussianMixture(COSINE, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)),
                             std=0.3)
    whole = sample(oracle, (6, 3), 9, solver=solver, seed=5)
    parts = torch.cat([sample(oracle, (2, 3), 9, solver=solver, seed=5, first=i)
                       for i in (0, 2, 4)])
    assert torch.allclose(whole, parts, atol=1e-5)
    assert torch.equal(whole, sample(oracle, (6, 3), 9, solver=solver, seed=5))
    assert not torch.equal(whole, sample(oracle, (6, 3), 9, solver=solver, seed=6))


def test_states_are_told():
    oracle = GaussianMixture(FLOW, torch.zeros(1, 2))
    states = list(sample_iter(oracle, (1, 2), 4, spacing="trailing"))
    assert [s.step for s in states] == [0, 1, 2, 3, 4] and states[0].pred is None
    assert [s.t.item() for s in states] == [1., 0.75, 0.5, 0.25, 0.]


def test_the_network_is_put_back_to_training():
    class Net(torch.nn.Module):
        def forward(self, x, t, cond):
            assert not self.training and not torch.is_grad_enabled()
            return x
    denoiser = Denoiser(Net(), COSINE, "v").train()
    image = torch.zeros(1, 2)
    sample(denoiser, (1, 2), 2)
    invert(denoiser, image, 2)
    inpaint(denoiser, image, image == 0, 2)
    assert denoiser.network.training
    states = sample_iter(denoiser, (1, 2), 2)  # left in the middle
    next(states), states.close()
    assert denoiser.network.training


def test_guidance_is_one_call():
    calls = []
    oracle = GaussianMixture(COSINE, torch.eye(3), std=0.1, labels=torch.arange(3))
    def counted(x, t, y):
        calls.append(len(x))
        return oracle(x, t, y)
    counted.schedule, counted.num_classes, counted.null_cond = COSINE, 3, -1
    x, t, y = torch.randn(2, 3), torch.tensor(500), torch.tensor([0, 2])
    assert guided(counted, 1.) is counted
    pred = guided(counted, 3.)(x, t, y)
    assert calls == [4]
    by_hand = oracle(x, t, torch.tensor([-1, -1])).x0
    by_hand = by_hand + 3*(oracle(x, t, y).x0 - by_hand)
    assert torch.allclose(pred.x0, by_hand, atol=1e-5)


@pytest.mark.parametrize("options, says", [
    (dict(solver="hein"), "did you mean heun?"), (dict(solver="eular"), "did you mean euler?"),
    (dict(solver="zzz"), "known are unipc"), (dict(spacing="x"), "known are logistic"),
    (dict(churn=Churn(1.)), "only 'edm'"),
    (dict(grid=torch.tensor([5, 7, -1])), "found 7 after 5; times must fall"),
    (dict(grid=torch.tensor([5, 5, -1])), "fall"),
    (dict(grid=torch.tensor([1000, 5])), "from at most 999"),
    (dict(grid=torch.tensor([5, -2])), "down to -1"),
    (dict(grid=torch.tensor([5])), "at least two"), (dict(grid=[float("nan"), 3.]), "must fall"),
    (dict(steps=0), "1 to 1000"), (dict(eta=2.), "0 \\(DDIM\\) to 1"),
    (dict(eta=.5, solver="ddpm"), "only 'ddim'"),
    (dict(cond=torch.tensor([0])), "unconditional")])
def test_refusals(options, says):
    oracle = GaussianMixture(COSINE, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=says): sample(oracle, (1, 2), **options)


@pytest.mark.parametrize("y, says", [(None, "pass cond"), (torch.tensor([3]), "found 3"),
                                     (torch.tensor([-2]), "found -2"),
                                     (torch.tensor([0, 1]), "one for each")])
def test_labels_refused(y, says):
    oracle = GaussianMixture(COSINE, torch.eye(3), labels=torch.arange(3))
    with pytest.raises(ValueError, match=says): sample(oracle, (1, 3), cond=y)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine", "sigmoid", "flow", "ve"])
def test_factories(schedule):
    made = create_scheduler(DiffusionConfig(schedule=schedule))
    oracle = GaussianMixture(made, torch.zeros(1, 2), std=5.)
    *_, last = create_sampler(SamplingConfig(steps=5))(oracle, (4, 2))
    assert last.x.abs().max() <= 1  # clamped to the data's range
    *_, last = create_sampler(SamplingConfig(steps=5, clip_x0=False))(oracle, (4, 2))
    assert last.x.abs().max() > 1


def test_a_config_reaches_the_sampler(monkeypatch):
    told = {}
    def spy(denoiser, shape, steps, solver, **options):
        told.update(options, steps=steps, solver=solver, shape=shape)
    monkeypatch.setattr("diffusion_model.sampler.sample_iter", spy)
    sampling = SamplingConfig(solver="edm", steps=7, spacing="karras", churn=3., churn_min=0.1,
                              churn_max=9., churn_noise=1.1)
    create_sampler(sampling)(GaussianMixture(COSINE, torch.zeros(1, 2)), (4, 2), seed=3)
    assert told == dict(steps=7, solver="edm", shape=(4, 2), spacing="karras", eta=0., seed=3,
                        churn=Churn(3., .1, 9., 1.1))


def test_dynamic_threshold_from_a_config():
    oracle = GaussianMixture(COSINE, torch.zeros(1, 50), std=5.)
    samplers = (create_sampler(SamplingConfig(steps=5, dynamic_threshold=p)) for p in (0.9, None))
    outs = [list(sampler(oracle, (4, 50)))[-1].x for sampler in samplers]
    assert outs[0].abs().max() <= 1 and not torch.allclose(*outs)


# Guidance
LABELLED = GaussianMixture(COSINE, torch.eye(3, **f64), std=0.3, labels=torch.arange(3))


@pytest.mark.parametrize("rescale, interval, says", [(1.5, None, "found 1.5"),
                                                     (0., (2., 1.), "low < high"),
                                                     (0., (-1., 1.), "0 <= low")])
def test_guidance_refused(rescale, interval, says):
    with pytest.raises(ValueError, match=says): guided(LABELLED, 2., rescale, interval)


def test_guidance_needs_a_condition():
    with pytest.raises(ValueError, match="guidance_scale: found 2 with an unconditional denoiser"):
        sample(guided(GaussianMixture(COSINE, torch.zeros(1, 2)), 2.), (1, 2))
    with pytest.raises(ValueError, match="guidance_scale: found 2, and no condition: pass cond"):
        guided(LABELLED, 2.)(torch.zeros(1, 3, **f64), torch.tensor(500))


def test_guidance_in_an_interval_for_a_batch_of_times():
    t, x = torch.tensor([100, 500, 990]), torch.randn(3, 3, **f64)
    y = torch.tensor([0, 1, 2])
    got = guided(LABELLED, 3., interval=(0.3, 5.))(x, t, y)
    for i, scale in enumerate((1., 3., 1.)):
        alone = guided(LABELLED, scale)(x[i:i + 1], t[i], y[i:i + 1])
        for a, b in zip(got, alone): assert torch.allclose(a[i:i + 1], b, atol=1e-10)


def test_rescale_keeps_contrast():
    x, y, t = torch.randn(5, 3, **f64), torch.tensor([0, 1, 2, 0, 1]), torch.tensor(400)
    pred = guided(LABELLED, 4., rescale=1.)(x, t, y)
    assert torch.allclose(pred.x0.std(1), LABELLED(x, t, y).x0.std(1))
    alpha, sigma = COSINE.alpha_sigma(t)
    assert torch.allclose(alpha*pred.x0 + sigma*pred.eps, x)


def test_labels_are_hidden_one_by_one():
    y = drop_cond(torch.arange(1000), torch.linspace(0, 0.999, 1000), 0.25, -1)
    assert (y[:250] == -1).all() and torch.equal(y[250:], torch.arange(250, 1000))


# Oracle
@pytest.mark.parametrize("std", [0., 0.2])
def test_chunks_do_not_matter(std):
    means, x = torch.randn(50, 3, 2, **f64), torch.randn(7, 3, 2, **f64)
    labels, y = torch.arange(50) % 4, torch.tensor([0, 1, 2, 3, -1, 0, 1])
    for t in (torch.tensor(10), torch.tensor(600), torch.arange(7)*100):
        whole, parts = (GaussianMixture(COSINE, means, std, labels=labels, chunk=c)
                        for c in (1000, 3))
        for a, b in zip(whole(x, t, y), parts(x, t, y)): assert torch.allclose(a, b, atol=1e-9)
        assert torch.allclose(whole.log_prob(x, t, y), parts.log_prob(x, t, y))


def test_likelihood_of_a_gaussian():
    bell = GaussianMixture(FLOW, torch.tensor([[0.3, -0.1]], **f64), std=0.5)
    x, t = torch.randn(9, 2, **f64), torch.tensor(0.3, **f64)
    by_torch = torch.distributions.Normal(0.7*bell.means, (0.49*0.25 + 0.09)**0.5)
    assert torch.allclose(bell.log_prob(x, t), by_torch.log_prob(x).sum(1))
    clean = torch.distributions.Normal(bell.means, 0.5).log_prob(x).sum(1)
    assert torch.allclose(bell.log_prob(x, torch.tensor(0.)), clean)
    with pytest.raises(ValueError, match="which is clean"):
        GaussianMixture(FLOW, bell.means).log_prob(x, torch.tensor(0.))


def test_likelihood_given_a_label():
    x = torch.randn(6, 3, **f64)
    for k in range(3):
        alone = GaussianMixture(COSINE, torch.eye(3, **f64)[k:k + 1], std=0.3)
        t = torch.tensor(300)
        assert torch.allclose(LABELLED.log_prob(x, t, torch.full((6,), k)), alone.log_prob(x, t))


# Nothing in the loop waits for a device
class NothingFetched(TorchDispatchMode):
    """Raises where a number of the device is asked for, or a tensor is carried to another device.
    (The device is 'meta', whose tensors have no values at all.)"""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        there, = {v.device.type for v in tree_leaves(out) if isinstance(v, torch.Tensor)} or {"cpu"}
        here = {v.device.type for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)}
        waits = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        carries = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        assert not (waits and "meta" in here) and not (carries and here != {there}), func
        return out


@pytest.mark.parametrize("wait", [
    lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.tolist(), lambda x: x[x > 0],
    lambda x: x.cpu(),
    lambda x: torch.ones(3).to(x), lambda x: x.copy_(torch.ones(3))])
def test_waiting_is_noticed(wait):
    x = torch.zeros(3, device="meta")
    with pytest.raises((RuntimeError, AssertionError, NotImplementedError)), NothingFetched():
        wait(x)


class OnMeta(torch.nn.Module):
    num_classes, null_cond = 3, -1
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4, device="meta")
    def forward(self, x, t, y): return self.layer(x)*t[:, None]


@pytest.mark.parametrize("limit", [clamped, thresholded])
@pytest.mark.parametrize("solver, options", [
    *((s, {}) for s in SOLVERS), ("ddim", dict(eta=0.5)), ("edm", dict(churn=Churn(5.)))])
@pytest.mark.parametrize("schedule, prediction", [(COSINE, "eps"), (ZERO, "v"), (FLOW, "flow"),
                                                  (VE, "edm")],
                         ids=["vp", "zero", "flow", "ve"])
def test_no_number_is_fetched_from_the_device(schedule, prediction, solver, options, limit):
    denoiser = limit(guided(Denoiser(OnMeta(), schedule, prediction), 3., 0.7, (0.1, 5.)))
    # labels are checked before the loop, so they start on the CPU
    states = sample_iter(denoiser, (2, 4), 6, solver, cond=torch.tensor([0, 2]), **options)
    next(states)
    with NothingFetched(): *_, last = states
    assert last.x.device.type == "meta" and last.t.device.type == "cpu"


# Editing
def test_editing():
    means = torch.randn(20, 6, generator=torch.Generator().manual_seed(1)).double()
    flow = GaussianMixture(FLOW, means, std=0.3)
    image = flow.sample(4)
    assert torch.allclose(image_to_image(flow, image, 1.), image_to_image(flow, 5*image, 1.))
    near, far = ((image_to_image(flow, image, s) - image).norm() for s in (0.05, 0.8))
    assert near < far
    assert torch.equal(image_to_image(flow, image[2:], 0.5, first=2),
                       image_to_image(flow, image, 0.5)[2:])
    mask = torch.tensor([True, False]*3)
    filled = inpaint(flow, image, mask, steps=5, repeats=2)
    assert torch.equal(filled[:, ~mask], image[:, ~mask]) and not torch.allclose(filled, image)
    assert torch.allclose(inpaint(flow, image[1:3], mask, steps=5, first=1),
                          inpaint(flow, image, mask, steps=5)[1:3])
    hole = torch.where(mask, torch.nan, image)  # what is in the hole does not matter
    assert torch.equal(inpaint(flow, hole, mask, steps=5), inpaint(flow, image, mask, steps=5))
    with pytest.raises(ValueError, match="allowed: bool"): inpaint(flow, image, mask.float())
    with pytest.raises(ValueError, match="at least 2"): interpolate(flow, image, image, n=1)
    for bad in (0., 1.1, -1.):
        with pytest.raises(ValueError, match="strength: found"): image_to_image(flow, image, bad)


@pytest.mark.parametrize("name", ["scaled_linear", "flow", "ve"])
def test_inversion_leads_back(name):
    blobs = GaussianMixture(ALL[name], torch.tensor([[-0.7, 0.], [0.6, 0.5]], **f64), std=0.3)
    x = blobs.sample(50)
    noise, grid = invert(blobs, x, 40, rounds=20)
    back = sample(blobs, (50, 2), solver="ddim", grid=grid, noise=noise)
    assert torch.allclose(back, x, atol=1e-5)
    path = interpolate(blobs, x[:3], x[3:6], n=3, steps=40, rounds=20)
    assert torch.allclose(path[0], x[:3], atol=1e-5) and torch.allclose(path[2], x[3:6], atol=1e-5)


def test_slerp():
    a, b = torch.randn(2, 4, 1000, **f64)
    assert torch.allclose(slerp(a, b, 0.), a) and torch.allclose(slerp(a, b, 1.), b)
    assert abs(slerp(a, b, 0.5).std() - 1) < 0.05
    assert slerp(a, a, 0.3).isfinite().all()


# Properties
@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.sampled_from(list(ALL)), st.sampled_from(list(PREDICTIONS)),
       st.sampled_from(list(SOLVERS)), st.sampled_from(list(SPACINGS)),
       st.sampled_from([*range(1, 31), 100, 999, 1000]), st.integers(0, 2**31),
       st.sampled_from([0., 1.]))
def test_every_combination(name, prediction, solver, spacing, steps, seed, stochastic):
    "Finite, ends clean, the same under a seed, and independent of how the batch is split."
    schedule = ALL[name]
    if not has(schedule, spacing): return
    if prediction == "eps" and name in ("zero", "flow"): return
    truth = GaussianMixture(schedule, torch.tensor([[0.4, -0.2], [-0.5, 0.3]], **f64), std=0.1)
    denoiser, answers = Denoiser(None, schedule, prediction), []

    def network(x, time, cond):  # answers in its own language what the truth would be
        t = answers[-1]
        alpha, sigma, p, q = denoiser.coefs(t)
        scaled = prediction == "edm" or schedule.scales_input
        scale = (sigma**2 + (alpha/2)**2).sqrt() if scaled else 1.
        pred = truth(x*scale, t)
        return p*pred.x0 + q*pred.eps
    denoiser.network = network
    def counted(x, t, cond=None):
        answers.append(t)
        return denoiser(x, t)
    counted.schedule = schedule
    options = dict(steps=steps, solver=solver, spacing=spacing, seed=seed)
    if solver == "ddim": options["eta"] = stochastic
    if solver == "edm": options["churn"] = Churn(10.*stochastic)
    size = math.hypot(*schedule.levels(schedule.grid(steps, spacing)[:1])[0])

    def go(first, n):
        noise = counter_normal(seed, "s", torch.arange(first, first + n), (2,)).double()*size
        return list(sample_iter(counted, (n, 2), first=first, noise=noise, **options))
    states = go(0, 4)
    whole = states[-1].x
    assert len(states) == steps + 1 and states[-1].t == schedule.clean
    assert all(s.x.isfinite().all() for s in states)
    assert torch.equal(whole, go(0, 4)[-1].x)
    scale = whole.abs().max().clamp(min=1)  # long steps can throw far out; rounding grows with them
    assert torch.allclose(whole/scale, torch.cat([go(0, 1)[-1].x, go(1, 3)[-1].x])/scale, atol=1e-6)
    # the last step gives x̂_0: no noise is left
    assert torch.allclose(whole/scale, states[-1].pred.x0/scale, atol=1e-9)


def test_leading_strides_are_whole_and_equal():
    "Times i·⌊T/steps⌋, where steps does not divide T, too (the stride is rounded, not the times)."
    grid = VPSchedule(linear_betas(1000)).grid(7, "leading")
    assert grid.tolist() == [852, 710, 568, 426, 284, 142, 0, -1]
