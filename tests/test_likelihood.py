"Likelihoods: against SciPy and torch, on every schedule; under networks; edges and errors."
import math

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from diffusion_model.counters import counter_normal
from diffusion_model.denoiser import Denoiser, Pred, wrap
from diffusion_model.likelihood import (Bound, Levels, bits_per_dim, bound_grid, circle_velocity,
                                        decoder_nats, dequantise, ode_log_prob, prior_kl, step_kl,
                                        variational_bound)
from diffusion_model.oracle import GaussianMixture
from diffusion_model.scheduler import (FlowSchedule, VESchedule, VPSchedule, cosine_betas,
                                       linear_betas)

SCHEDULES = {"linear": VPSchedule(linear_betas()), "cosine": VPSchedule(cosine_betas()),
             "zero terminal": VPSchedule(linear_betas(), zero_terminal=True),
             "flow": FlowSchedule(), "ve": VESchedule()}


def mixture(schedule, labels=None, shape=(8,)):
    "Four Gaussians of unequal share and width, centred."
    means = 0.7*counter_normal(5, "means", torch.arange(4), shape).double()
    weights = torch.tensor([1., 2, 3, 4]).double()
    means = means - torch.tensordot(weights, means, 1)/weights.sum()
    return GaussianMixture(schedule, means, torch.tensor([0.1, 0.2, 0.3, 0.5]), weights, labels)


def clean(model): return torch.tensor(model.schedule.clean)


def within(values, truth):
    "The mean is within four standard errors of the truth."
    return abs(values.mean() - truth) < 4*values.std()/len(values)**0.5


@pytest.mark.parametrize("name", SCHEDULES)
def test_exact_divergence_gives_the_oracles_density(name):
    "Within 1e-3 nats a dimension, at the clean time and at noisy ones."
    model = mixture(SCHEDULES[name])
    x = model.sample(60)
    found = ode_log_prob(model, x, 48)
    assert (found.value - model.log_prob(x, clean(model))).abs().max() < 8e-3
    assert (found.standard_error == 0).all() and found.value.dtype == torch.float64
    ratio = torch.tensor([0.3, 3.]).double()
    for t in model.schedule.t_of_log_snr(-2*ratio.log()):
        xt = model.schedule.add_noise(x, counter_normal(1, "z", torch.arange(60), (8,)).double(), t)
        found = ode_log_prob(model, xt, 24, t=t).value
        assert (found - model.log_prob(xt, t)).abs().max() < 8e-3


@pytest.mark.parametrize("name", ["cosine", "flow", "ve"])
def test_ode_against_scipy(name):
    "The same equation in other coordinates (Karras et al. 2022), solved by SciPy."
    means = torch.tensor([[-1., 0.2], [0.8, -0.16]]).double()
    model = GaussianMixture(VESchedule(1e-3, 200.), means, torch.tensor([0.2, 0.4]), [4., 5.])
    x = model.sample(3)

    def rate(sigma, state):  # dy/dσ = ε̂, and its divergence, by differences
        y, t = torch.tensor(state[:2])[None], torch.tensor(sigma)
        step = 1e-5*torch.eye(2).double()
        ahead, behind = model(y + step, t).eps, model(y - step, t).eps
        slope = model(y, t).eps[0].tolist()
        return [*slope, (ahead - behind).diagonal().sum().item()/2e-5]

    for row in x:
        state = [*row.tolist(), 0.]
        end = solve_ivp(rate, (1e-4, 200.), state, rtol=1e-6, atol=1e-8, method="LSODA").y[:, -1]
        size = math.hypot(1, 200)
        there = -(end[:2]**2).sum()/2/size**2 - math.log(2*math.pi*size**2) + end[2]
        ours = GaussianMixture(SCHEDULES[name], model.means, model.variance.sqrt(), [4., 5.])
        assert abs(ode_log_prob(ours, row[None], 100).value.item() - there) < 2e-3


def test_hutchinson_is_within_its_own_error():
    "On average exactly right, and within two standard errors for about 95 % of the points."
    model = mixture(FlowSchedule())
    x = model.sample(500)
    exact = ode_log_prob(model, x, 24).value
    found = ode_log_prob(model, x, 24, probes=48, seed=3)
    assert within(found.value - exact, 0.)
    share = ((found.value - exact).abs() < 2*found.standard_error).double().mean()
    assert 0.91 < share < 0.985
    few = ode_log_prob(model, x, 24, probes=12, seed=3)
    assert 1.6 < (few.standard_error/found.standard_error).median() < 2.4  # 1/√probes


def test_one_probe_does_not_know_its_error():
    model = mixture(FlowSchedule())
    found = ode_log_prob(model, model.sample(3), 8, probes=1)
    assert found.standard_error.isnan().all() and found.value.isfinite().all()


@pytest.mark.parametrize("name", ["linear", "cosine", "flow", "ve"])
def test_the_bounds_gap_vanishes_as_one_over_the_steps(name):
    model = mixture(SCHEDULES[name])
    x0 = model.sample(1500)
    truth = model.log_prob(x0, clean(model))
    gaps = [variational_bound(model, x0, steps).total + truth for steps in (100, 200, 400)]
    for gap in gaps: assert gap.mean() > 4*gap.std()/1500**0.5
    assert 1.8 < gaps[0].mean()/gaps[1].mean() < 2.3
    assert within(2*gaps[2] - gaps[1], 0.)


def test_a_chain_of_random_steps_is_without_bias():
    model = mixture(FlowSchedule())
    x0 = model.sample(2000)
    every = variational_bound(model, x0, 90)
    some = variational_bound(model, x0, 90, evaluations=20)
    assert some.terms.shape == (2000, 20) and every.terms.shape == (2000, 89)
    assert within(some.total - every.total, 0.)
    limit = variational_bound(model, x0, 50_000, evaluations=80).total
    assert within(limit + model.log_prob(x0, clean(model)), 0.)


def test_ddpms_own_chain_is_the_sum_of_its_kls():
    "All T of them, with the schedule's posterior and torch's divergence (Ho et al. 2020, Eq. 5)."
    schedule = VPSchedule(linear_betas(30))
    model = mixture(schedule)
    x0 = model.sample(4)
    found = variational_bound(model, x0)
    assert found.terms.shape == (4, 29) and bound_grid(schedule).tolist() == [*range(29, -2, -1)]
    normal, kl = torch.distributions.Normal, torch.distributions.kl_divergence
    for k, t in enumerate(range(29, 0, -1)):
        noise = counter_normal(0, f"bound {k}", torch.arange(4), (8,)).double()
        t = torch.tensor(t)
        xt = schedule.add_noise(x0, noise, t)
        bells = [normal(mean, variance.sqrt()) for mean, variance, _ in
                 (schedule.posterior(x, xt, t) for x in (x0, model(xt, t).x0))]
        assert torch.allclose(found.terms[:, k], kl(*bells).sum(1))
    noise, t = counter_normal(0, "decoder", torch.arange(4), (8,)).double(), torch.tensor(0)
    alpha, sigma = schedule.alpha_sigma(t)
    guess = model(schedule.add_noise(x0, noise, t), t).x0
    assert torch.allclose(found.decoder, -normal(guess, sigma/alpha).log_prob(x0).sum(1))
    alpha, sigma = schedule.alpha_sigma(torch.tensor(29))
    prior = kl(normal(alpha*x0, sigma), normal(torch.zeros(8).double(), 1.)).sum(1)
    assert torch.allclose(found.prior, prior)
    assert torch.allclose(found.total, found.prior + found.terms.sum(1) + found.decoder)


def test_priors_of_flow_and_ve():
    x0 = mixture(FlowSchedule()).sample(5)
    assert (prior_kl(x0, FlowSchedule().levels(torch.tensor([1.]))[0]) == 0).all()
    level, = VESchedule(sigma_max=2.).levels(torch.tensor([2.]))
    normal = torch.distributions.Normal
    truth = torch.distributions.kl_divergence(normal(x0, 2.), normal(0.*x0, 5**0.5)).sum(1)
    assert torch.allclose(prior_kl(x0, level), truth)


def test_bits_of_a_rounded_gaussian():
    "Bound and ODE find the exact entropy of 256 levels, within their Monte Carlo error."
    levels = Levels()
    model = GaussianMixture(VESchedule(sigma_min=0.01), torch.zeros(1, 1, 4, 4).double(), 0.3)
    raw = model.sample(800)
    index = ((raw + 1)/levels.width).round().clamp(0, 255)
    x = index*levels.width - 1
    edges = torch.linspace(-1, 1, 256).double() + levels.width/2
    cdf = torch.distributions.Normal(torch.tensor(0.).double(), 0.3).cdf(edges)
    mass = torch.cat([cdf[:1], cdf[1:-1] - cdf[:-2], 1 - cdf[-2:-1]])
    own = -mass.log2()[index.long()].flatten(1).mean(1)
    bound = variational_bound(model, x, 50_000, levels=levels, evaluations=60)
    assert within(bits_per_dim(bound.total, 16), -(mass*mass.log2()).sum())
    assert within(bits_per_dim(bound.total, 16) - own, 0.)
    spread = dequantise(x, levels, seed=1)
    assert (spread - x).abs().max() <= levels.width/2
    assert abs((spread - x).std() - levels.width/12**0.5) < 1e-4
    ode = bits_per_dim(-ode_log_prob(model, spread, 24).value, 16, levels.width)
    assert within(ode - own, 0.) and abs(bits_per_dim(torch.tensor(0.), 9, 2/255) - 6.9943) < 1e-3
    assert bits_per_dim(torch.tensor(8*12*math.log(2)), 12) == pytest.approx(8)


def test_a_finite_data_set_of_bytes_has_a_probability():
    "Each of K points costs ln K; a density it has not."
    points = Levels().width*torch.tensor([[20., 250, 0], [90, 4, 255]]).double() - 1
    model = GaussianMixture(VESchedule(1e-4, 50.), points)
    x0 = points.repeat(400, 1)
    found = variational_bound(model, x0, 20_000, levels=Levels(), evaluations=200).total
    assert within(found, math.log(2))
    with pytest.raises(ValueError, match="components with std 0"): variational_bound(model, x0)
    with pytest.raises(ValueError, match="components with std 0"): ode_log_prob(model, x0)
    t = torch.tensor(0.5).double()  # with noise they have one
    found = ode_log_prob(model, x0[:2] + 0.1, 100, t=t).value
    assert torch.allclose(found, model.log_prob(x0[:2] + 0.1, t), atol=5e-3)


def test_classes_and_batches():
    "A condition reaches the denoiser, and a sample's result is its own whatever batch it is in."
    model = mixture(FlowSchedule(), labels=torch.tensor([0, 0, 1, 1]))
    x, cond = model.sample(6), torch.tensor([0, 1, 0, 1, -1, 0])
    exact = model.log_prob(x, clean(model), cond)
    found = ode_log_prob(model, x, 150, cond).value
    near = exact > -60  # far from its class a point asks for more steps than a test has
    assert near.sum() >= 3 and torch.allclose(found[near], exact[near], atol=0.02)
    same, label = x[3:4].expand(1000, 8), cond[3:4].expand(1000)
    nats = variational_bound(model, same, 50_000, label, evaluations=60).total
    assert within(nats, -exact[3])
    whole = variational_bound(model, x, 40, cond, evaluations=7, seed=2).total
    parts = [variational_bound(model, x[part], 40, cond[part], evaluations=7, seed=2,
                               first=part.start).total for part in (slice(0, 2), slice(2, 6))]
    assert torch.allclose(torch.cat(parts), whole)
    assert not torch.allclose(variational_bound(model, x, 40, 1 - cond.abs(), evaluations=7,
                                                seed=2).total, whole)
    assert not torch.allclose(variational_bound(model, x, 40, cond, evaluations=7).total, whole)
    probed = ode_log_prob(model, x, 8, cond, probes=3, seed=4).value
    part = ode_log_prob(model, x[4:], 8, cond[4:], probes=3, seed=4, first=4).value
    assert torch.allclose(part, probed[4:])
    assert not torch.allclose(ode_log_prob(model, x, 8, cond, probes=3, seed=5).value, probed)


class Net(nn.Module):
    "Any small network with dropout, which must be off."
    def __init__(self):
        super().__init__()
        self.conv, self.drop, self.out = nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.5), \
            nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x, time, cond=None):
        return self.out(self.drop(self.conv(x).tanh()*(1 + time[:, None, None, None]/1000).cos()))


@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_under_a_network(name):
    "Modes and gradients stay as they are; dropout is off; the precision is x's."
    torch.manual_seed(0)
    denoiser = Denoiser(Net(), SCHEDULES[name], "v").train()
    x = 0.5*counter_normal(0, "x", torch.arange(3), (1, 3, 3))
    marks = [torch.full_like(p, 7.) for p in denoiser.parameters()]
    for p, mark in zip(denoiser.parameters(), marks): p.grad = mark.clone()
    found = ode_log_prob(denoiser, x, 8)
    again = ode_log_prob(denoiser, x, 8)
    assert found.value.dtype == torch.float32 and torch.equal(found.value, again.value)
    assert not found.value.requires_grad and all(m.training for m in denoiser.modules())
    bound = variational_bound(denoiser, x, 30)
    assert torch.equal(bound.total, variational_bound(denoiser, x, 30).total)
    assert bound.total.dtype == torch.float32 and not bound.total.requires_grad
    assert all(torch.equal(p.grad, m) for p, m in zip(denoiser.parameters(), marks))
    probed = ode_log_prob(denoiser, x, 8, probes=40)
    assert ((probed.value - found.value).abs() < 5*probed.standard_error).all()
    with torch.no_grad(): assert torch.equal(ode_log_prob(denoiser, x, 8).value, found.value)


def test_a_networks_density_integrates_to_one():
    "Whatever a denoiser says, its flow only moves mass."
    class Timeless(nn.Sequential):
        def forward(self, x, time, cond=None): return super().forward(x)
    torch.manual_seed(1)
    layers = Timeless(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    denoiser = Denoiser(layers, FlowSchedule(), "v")
    line = torch.linspace(-12, 12, 1601).double()[:, None]
    mass = ode_log_prob(denoiser, line, 64).value.exp().sum()*(line[1] - line[0])
    assert abs(mass - 1) < 1e-3


def test_velocity_is_the_derivative_of_the_circle():
    "For one point the path is known: cos φ·x_0 + sin φ·ε."
    for name in ("cosine", "flow", "ve"):
        schedule = SCHEDULES[name]
        model = GaussianMixture(schedule, torch.tensor([[0.3, -0.2]]).double())
        t = schedule.t_of_log_snr(torch.tensor(0.7).double())
        alpha, sigma = schedule.alpha_sigma(t)
        eps = torch.tensor([[1.1, 0.4]]).double()
        size = torch.hypot(alpha, sigma)
        u = (alpha*model.means + sigma*eps)/size
        assert torch.allclose(circle_velocity(model, u, t), (alpha*eps - sigma*model.means)/size)


def test_steps_of_a_wrong_denoiser_cost_more():
    "Among denoisers, the oracle has the lowest terms, on the same noise."
    model = mixture(FlowSchedule())
    moved = wrap(model, lambda x, t, cond=None: Pred(model(x, t).x0 + 0.1, model(x, t).eps))
    x0, z = model.sample(800), counter_normal(0, "z", torch.arange(800), (8,)).double()
    for t, s in ((0.9, 0.8), (0.4, 0.1), (0.05, 0.04)):
        t, s = torch.tensor(t), torch.tensor(s)
        extra = step_kl(moved, x0, z, t, s) - step_kl(model, x0, z, t, s)
        assert extra.mean() > 4*extra.std()/800**0.5
        each = step_kl(model, x0, z, t.expand(800), s.expand(800))  # a time for each sample
        assert torch.allclose(each, step_kl(model, x0, z, t, s))


def test_the_decoder_owns_all_numbers():
    levels = Levels(4, 0., 3.)
    model = GaussianMixture(VESchedule(0.5, 10.), torch.zeros(1, 1).double(), 1.)
    grey = torch.arange(4.).double()[:, None]
    class Fixed:
        schedule = model.schedule
        def __call__(self, x, t, cond=None): return Pred(torch.full_like(x, 2.7), x)
    nats = decoder_nats(Fixed(), grey, torch.zeros(4, 1).double(), torch.tensor(0.5), levels=levels)
    assert abs((-nats).exp().sum() - 1) < 1e-12 and nats.argmin() == 3


X = torch.zeros(2, 8).double()


@pytest.mark.parametrize("call", [variational_bound, ode_log_prob])
@pytest.mark.parametrize("x, words", [
    (torch.zeros(8).double(), r"found shape \(8,\)"), (torch.zeros(0, 8), r"found shape \(0, 8\)"),
    (torch.zeros(2, 7).double(), r"found samples of shape \(7,\)"),
    (torch.zeros(2, 8, dtype=torch.uint8), "found torch.uint8"), (X*torch.nan, "found NaN"),
    (X + torch.inf, "found NaN or infinity")])
def test_data_that_have_no_likelihood(call, x, words):
    with pytest.raises(ValueError, match=words): call(mixture(FlowSchedule()), x)


@pytest.mark.parametrize("change, words", [
    (dict(steps=0), "steps: found 0"), (dict(steps=1), "steps: found 1, with pure noise"),
    (dict(evaluations=0), "evaluations: found 0"),
    (dict(steps=9, evaluations=9), "allowed: 1 to 8"),
    (dict(levels=Levels()), "up to 0.5 of a level off"),
    (dict(levels=Levels(11, -2., -1.)), "found values from 0 to 0")])
def test_bounds_that_cannot_be(change, words):
    model = mixture(FlowSchedule())
    with pytest.raises(ValueError, match=words): variational_bound(model, X, **change)


@pytest.mark.parametrize("change, words", [
    (dict(steps=0), "steps: found 0"), (dict(probes=-1), "probes: found -1"),
    (dict(t=torch.tensor(1.)), "t: found 1.0"),
    (dict(t=torch.tensor([0.1, 0.2])), "allowed: one time"),
    (dict(t=torch.tensor(-0.1)), "from 0.0")])
def test_densities_that_cannot_be(change, words):
    with pytest.raises(ValueError, match=words): ode_log_prob(mixture(FlowSchedule()), X, **change)


def test_discrete_schedules_have_no_more_than_their_steps():
    model = mixture(VPSchedule(cosine_betas(20)))
    with pytest.raises(ValueError, match="found 64; allowed: 1 to 20"): ode_log_prob(model, X)
    assert variational_bound(model, X, 1).terms.shape == (2, 0)
    assert isinstance(variational_bound(model, X), Bound)


def test_a_denoiser_without_gradient_is_named():
    model = mixture(FlowSchedule())
    blind = wrap(model, lambda x, t, cond=None: Pred(*(p.detach() for p in model(x, t))))
    with pytest.raises(ValueError, match="no gradient"): ode_log_prob(blind, X)
