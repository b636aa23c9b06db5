"Faults of sampling, guidance and editing that were found and mended, and what they now promise."
import itertools
import types

import pytest
import torch
from devices import apple
from test_core import NothingFetched

from diffusion_model.config import SamplingConfig
from diffusion_model.counters import counter_normal
from diffusion_model.denoiser import Denoiser, clamped
from diffusion_model.editing import image_to_image, inpaint, interpolate, invert
from diffusion_model.guidance import drop_cond, guided
from diffusion_model.oracle import GaussianMixture
from diffusion_model.sampler import (SOLVERS, Churn, Solver, create_sampler, ddim_step, evaluating,
                                     noise_like, sample, sample_iter, solve)
from diffusion_model.scheduler import (FlowSchedule, VESchedule, VPSchedule, cosine_betas,
                                       linear_betas)

COSINE, FLOW, VE = VPSchedule(cosine_betas()), FlowSchedule(), VESchedule()
ZERO = VPSchedule(linear_betas(), zero_terminal=True)
ALL = {"cosine": COSINE, "zero": ZERO, "flow": FLOW, "ve": VE}
MASK = torch.tensor([True, False, True, False])
EDITS = {
    "image_to_image": lambda d, a, b, c, s: image_to_image(d, a, 0.6, 5, spacing=s, cond=c),
    "inpaint": lambda d, a, b, c, s: inpaint(d, a, MASK, 4, 2, cond=c, spacing=s),
    "invert": lambda d, a, b, c, s: invert(d, a, 4, c, spacing=s)[0],
    "interpolate": lambda d, a, b, c, s: interpolate(d, a, b, 3, 4, c)}


class Net(torch.nn.Module):
    "Labels, or a vector by name; the condition and the time must be where the image is."
    def __init__(self, null=-1):
        super().__init__()
        self.layer, self.null_cond = torch.nn.Linear(4, 4), null
        self.num_classes = 0 if isinstance(null, dict) else 3
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x, t, cond):
        assert not (self.training or self.drop.training or torch.is_grad_enabled())
        shift = cond["place"] if isinstance(cond, dict) else cond[:, None].float()
        return self.drop(self.layer(x)) + shift + t[:, None]/1000


LABELS = torch.tensor([0, 2, -1])
PLACES = {"place": torch.linspace(-1, 1, 12).reshape(3, 4)}


# 4: editing on a device
class CondIsCarried(NothingFetched):
    "Nothing is fetched or carried but the condition, which the user has on the CPU."
    def __init__(self, cond):
        super().__init__()
        self.cond, self.carried = cond, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func is torch.ops.aten._to_copy.default and args[0] is self.cond):
            return super().__torch_dispatch__(func, types, args, kwargs)
        self.carried += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.mended(4)
@pytest.mark.parametrize("name, edit, spacing", list(
    itertools.product(ALL, EDITS, ("logistic", "trailing"))))
def test_editing_never_waits_for_the_device(monkeypatch, name, edit, spacing):
    monkeypatch.setattr(f"{__name__}.MASK", MASK.to("meta"))
    denoiser = guided(Denoiser(Net().to("meta"), ALL[name], "v"), 2.)
    images = torch.zeros(2, 3, 4, device="meta")
    with CondIsCarried(LABELS) as mode:
        out = EDITS[edit](denoiser, *images, LABELS, spacing)
    assert out.device.type == "meta" and out.shape[-2:] == (3, 4)
    assert mode.carried == {"interpolate": 3}.get(edit, 1)


@pytest.mark.mended(4)
@pytest.mark.parametrize("name, edit, cond", list(
    itertools.product(ALL, EDITS, (LABELS, PLACES))))
def test_editing_on_a_device_gives_what_the_cpu_gives(name, edit, cond):
    "Image, mask and condition may all lie on the CPU: they follow the network."
    torch.manual_seed(0)
    network = Net(-1 if cond is LABELS else {"place": torch.zeros(4)})
    images = torch.randn(2, 3, 4)
    wanted = EDITS[edit](Denoiser(network, ALL[name], "v"), *images, cond, "logistic")
    with apple():
        denoiser = Denoiser(network.to("mps"), ALL[name], "v")
        for given in (images, images.to("mps")):
            got = EDITS[edit](denoiser, *given, cond, "logistic")
            assert got.device.type == "mps"
            torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.mended(4)
@pytest.mark.parametrize("edit", EDITS)
def test_editing_refuses_conditions_that_cannot_be(edit):
    labelled, a, b = Denoiser(Net(), COSINE, "v"), *torch.zeros(2, 3, 4)
    for cond, says in ((None, "pass cond"), (LABELS[:2], "one for each of 3"),
                       (LABELS + 1, "found 3; allowed: 0 to 2"), (PLACES, "found dict")):
        with pytest.raises(ValueError, match=says): EDITS[edit](labelled, a, b, cond, "logistic")
    with pytest.raises(ValueError, match="unconditional"):
        EDITS[edit](GaussianMixture(COSINE, torch.zeros(1, 4)), a, b, LABELS, "logistic")


# 12: a Step kept from the loop, and two samplers over one network in training
@pytest.mark.mended(12)
@pytest.mark.parametrize("name", ALL)
def test_a_kept_step_belongs_to_its_place(monkeypatch, name):
    kept, schedule = [], ALL[name]
    def keeping(step):
        kept.append(step)
        return ddim_step(step.x, step.pred, step.here, step.there)
    monkeypatch.setitem(SOLVERS, "keeping", Solver(keeping))
    oracle, x = GaussianMixture(schedule, torch.eye(2), std=0.3), torch.randn(3, 2)
    grid = schedule.grid(6)[:-1]  # ends above clean, where ε̂ is still defined
    list(solve(oracle, x, grid, "keeping", draw=noise_like(x, seed=4)))
    for i, step in enumerate(kept):
        noise = counter_normal(4, f"step {i}", torch.arange(3), (2,))
        assert torch.equal(step.noise(), noise) and torch.equal(step.noise(), noise)
        for got, wanted in zip(step.denoise(x), oracle(x, grid[i + 1])):
            assert torch.equal(got, wanted)
        assert [step.here, step.there] == schedule.levels(grid[i:i + 2])


@pytest.mark.mended(12)
def test_samplers_by_turns_leave_each_other_alone():
    denoiser = Denoiser(Net(), COSINE, "v")
    alone = [s.x for s in sample_iter(denoiser, (3, 4), 4, cond=LABELS)]
    one, other = (sample_iter(denoiser, (3, 4), n, cond=LABELS) for n in (4, 7))
    for state, x in zip(one, alone):  # the network itself refuses to be evaluated in training mode
        next(other)
        assert torch.equal(state.x, x)
        assert denoiser.network.training and denoiser.network.drop.training
    invert(denoiser, torch.zeros(3, 4), 3, LABELS)  # and in the middle of the other
    assert len(list(other)) == 3 and denoiser.network.training


@pytest.mark.mended(12)
def test_modes_are_those_before_part_by_part():
    network = Net()
    network.layer.eval()
    denoiser = Denoiser(network, COSINE, "v")
    def modes(): return [m.training for m in (network, network.layer, network.drop)]
    with evaluating(denoiser):
        assert modes() == [False, False, False]
        with evaluating(denoiser): pass
        assert modes() == [False, False, False]
    assert modes() == [True, False, True]
    held = sample_iter(denoiser, (3, 4), 4, cond=LABELS)  # never finished, never closed
    next(held), next(held)
    assert modes() == [True, False, True]
    with pytest.raises(ZeroDivisionError), evaluating(denoiser): _ = 1/0
    assert modes() == [True, False, True]
    network.eval()
    sample(denoiser, (3, 4), 2, cond=LABELS)
    assert modes() == [False, False, False]


# 15: a check of the order of guidance and clamp that can fail
@pytest.mark.mended(15)
def test_guidance_comes_before_the_clamp(monkeypatch):
    "The widest prediction tells the right order from the wrong one; the widest sample did not."
    data = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))/2
    oracle = GaussianMixture(COSINE, data, std=0.5, labels=torch.arange(3))

    def widest():
        _, *states = create_sampler(SamplingConfig(steps=6, guidance_scale=8.))(
            oracle, (6, 20), cond=torch.arange(6) % 3)
        return max(s.pred.x0.abs().max() for s in states)

    assert widest() <= 1
    monkeypatch.setattr("diffusion_model.sampler.guided",
                        lambda d, scale, *rest: guided(clamped(d), scale, *rest))
    monkeypatch.setattr("diffusion_model.sampler.clamped", lambda d, *range: d)
    assert widest() > 2


# What the registry promises
@pytest.mark.parametrize("name", SOLVERS)
def test_an_entry_says_what_its_solver_costs_and_understands(name):
    oracle, asked, entry = GaussianMixture(COSINE, torch.zeros(1, 2)), [], SOLVERS[name]
    def counted(x, t, cond=None):
        asked.append(t)
        return oracle(x, t)
    counted.schedule = COSINE
    sample(counted, (1, 2), 5, solver=name)
    assert len(asked) == 4*entry.evaluations + 1
    for option, value in (("eta", 0.5), ("churn", Churn(2.))):
        if option in entry.options: sample(counted, (1, 2), 5, solver=name, **{option: value})
        else:
            with pytest.raises(ValueError, match=f"{option}: found .* with solver '{name}'; only"):
                sample(counted, (1, 2), 5, solver=name, **{option: value})


def test_a_solver_of_ones_own(monkeypatch):
    "One entry, and the loop, its checks and the factory know it: a step, a correction, an option."
    def halfway(step):
        noise = step.noise() if step.eta else None
        return ddim_step(step.x, step.pred, step.here, step.there, step.eta/2, noise)
    corrected = []
    def correct(x, pred, here, last):
        corrected.append(last and last.there == here)
        return x
    monkeypatch.setitem(SOLVERS, "halfway", Solver(halfway, correct, ("eta",)))
    oracle = GaussianMixture(COSINE, torch.eye(2), std=0.3)
    fields = SamplingConfig(steps=4, clip_x0=False).model_dump() | dict(solver="halfway", eta=0.6)
    *_, own = create_sampler(types.SimpleNamespace(**fields))(oracle, (3, 2), seed=2)
    assert torch.equal(own.x, sample(oracle, (3, 2), 4, solver="ddim", eta=0.3, seed=2))
    assert corrected == [None, True, True, True]
    with pytest.raises(ValueError, match="only 'ddim' or 'halfway' has it"):
        sample(oracle, (1, 2), solver="euler", eta=0.5)
    with pytest.raises(ValueError, match="did you mean halfway"):
        sample(oracle, (1, 2), solver="halfwy")


def test_the_memory_of_steps_is_two_deep(monkeypatch):
    seen = []
    def looking(step):
        depth, s = 0, step
        while s.last: depth, s = depth + 1, s.last
        seen.append(depth)
        return step.pred.x0
    monkeypatch.setitem(SOLVERS, "looking", Solver(looking))
    sample(GaussianMixture(COSINE, torch.zeros(1, 2)), (1, 2), 6, solver="looking")
    assert seen == [0, 1, 2, 2, 2, 2]


# Conditions of any make
def test_guidance_and_dropping_of_conditions_by_name():
    null = {"place": torch.tensor([1., 2., 3., 4.]), "size": 9}
    cond = {"place": PLACES["place"], "size": torch.tensor([1, 2, 3])}
    dropped = drop_cond(cond, torch.tensor([0.05, 0.5, 0.0]), 0.1, null)
    assert dropped["size"].tolist() == [9, 2, 9]
    hidden = null["place"]
    assert torch.equal(dropped["place"], torch.stack([hidden, cond["place"][1], hidden]))
    class Place(torch.nn.Module):
        null_cond = null
        def forward(self, x, t, cond): return cond["place"]*cond["size"][:, None]
    x = sample(guided(Denoiser(Place(), COSINE, "x0"), 3.), (3, 4), 2, cond=cond)
    none = null["place"]*9
    wanted = none + 3*(cond["place"]*cond["size"][:, None] - none)
    assert torch.allclose(x, wanted, atol=1e-3)


def test_no_range_is_never_clamped():
    oracle = GaussianMixture(COSINE, torch.zeros(1, 50), std=5.)
    def widest(range, **fields):
        *_, last = create_sampler(SamplingConfig(steps=5, **fields), range)(oracle, (4, 50))
        return last.x.abs().max()
    for fields in ({}, dict(dynamic_threshold=0.9)):
        assert widest(None, **fields) == widest((-1., 1.), clip_x0=False) > 5
        assert widest((-2., 2.), **fields) == 2


def test_a_sampler_refuses_at_the_call():
    "Not when its first state is asked for, which may be much later."
    oracle = GaussianMixture(COSINE, torch.zeros(1, 2))
    with pytest.raises(ValueError, match="did you mean ddim"):
        sample_iter(oracle, (1, 2), solver="dim")
    with pytest.raises(ValueError, match=r"noise: found shape \(3, 2\); allowed: \(1, 2\)"):
        sample_iter(oracle, (1, 2), noise=torch.zeros(3, 2))
