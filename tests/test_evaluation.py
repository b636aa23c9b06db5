"""The metrics, held against prdc, torch-fidelity and SciPy, and against what they must say"""
import numpy as np
import pytest
import torch
from prdc import compute_prdc
from scipy import linalg, optimize, stats
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from diffusion_model import evaluation
from diffusion_model.counters import counter_normal, counter_uniform
from diffusion_model.evaluation import (
    METRICS, Evidence, Metric, Moments, class_accuracy, coverage, density, fd, frechet_distance,
    kid, memorised, mind, nearest, precision, radii, recall, score, wasserstein_1d)

SPATIAL = [precision, recall, density, coverage]
ALL = [fd, kid, mind, *SPATIAL]


def points(n: int, d: int, stream: str, scale: float = 1., shift: float = 0.) -> Tensor:
    "Correlated, skewed numbers, as features are."
    x = counter_normal(0, stream, torch.arange(n), (d,)).double()
    mix = counter_normal(1, "mix", torch.arange(d), (d,)).double()/d**0.5 + torch.eye(d).double()
    return torch.nn.functional.silu(scale*x @ mix) + shift


def close(found: float, wanted: float, rel: float = 1e-6) -> None:
    assert found == pytest.approx(wanted, rel=rel), (found, wanted)


SETS = [(300, 400, 8, 1.1, 0.1), (400, 300, 33, 0.9, 0.), (500, 500, 2, 1., 0.05)]


@pytest.fixture(params=SETS, ids=str)
def pair(request):
    n, m, d, scale, shift = request.param
    return points(n, d, "samples", scale, shift), points(m, d, "reference")


# -- held against libraries

@pytest.mark.parametrize("k", [1, 3, 5])
def test_prdc(pair, k):
    samples, reference = pair
    wanted = compute_prdc(reference.numpy(), samples.numpy(), nearest_k=k)
    for metric in SPATIAL: close(metric(samples, reference, k), wanted[metric.__name__])


def test_fd_as_torch_fidelity(pair):
    samples, reference = pair
    wanted = fid_statistics_to_metric(*map(fid_features_to_statistics, pair), verbose=False)
    close(fd(samples, reference), wanted["frechet_inception_distance"])


def test_kid_as_torch_fidelity(pair):
    samples, reference = (x[:300] for x in pair)
    wanted = kid_features_to_metric(
        samples, reference, kid_subsets=1, kid_subset_size=300, kid_kernel="poly",
        kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1.,
        rng_seed=0, verbose=False)
    close(kid(samples, reference), wanted["kernel_inception_distance_mean"])


def test_kid_of_unequal_sizes():
    x, y = points(7, 3, "samples"), points(5, 3, "reference", 1.5)
    kernel = lambda a, b: (float(a @ b)/3 + 1)**3
    own = lambda z: np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z)
                             if i != j])
    close(kid(x, y), own(x) + own(y) - 2*np.mean([kernel(a, b) for a in x for b in y]), 1e-12)


@pytest.mark.parametrize("n, m", [(50, 50), (50, 31), (7, 1000), (1, 9)])
def test_wasserstein_1_as_scipy(n, m):
    a, b = points(n, 4, "a"), points(m, 4, "b", 2., -0.3)
    wanted = [stats.wasserstein_distance(a[:, i], b[:, i]) for i in range(4)]
    assert wasserstein_1d(a, b, 1).tolist() == pytest.approx(wanted, rel=1e-9)


def test_wasserstein_2_is_the_best_assignment():
    a, b = points(40, 3, "a"), points(40, 3, "b", 2., -0.3)
    for i in range(3):
        cost = (a[:, None, i] - b[None, :, i]).numpy()**2
        best = cost[optimize.linear_sum_assignment(cost)].mean()
        close(wasserstein_1d(a, b)[i].item(), best, 1e-9)
        close(wasserstein_1d(a, b, 2)[i].item(),
              np.mean((np.sort(a[:, i]) - np.sort(b[:, i]))**2), 1e-9)


def test_wasserstein_2_of_unequal_sizes_is_that_of_repeated_rows():
    a, b = points(6, 2, "a"), points(10, 2, "b", 2.)
    many = wasserstein_1d(a.repeat(5, 1), b.repeat(3, 1))
    assert wasserstein_1d(a, b).tolist() == pytest.approx(many.tolist(), rel=1e-12)


# -- what must come out

def test_fd_of_two_gaussians_is_the_closed_form():
    a, b = points(500, 6, "a"), points(400, 6, "b", 1.4, 0.2)
    one, two = Moments().update(a), Moments().update(b)
    root = linalg.sqrtm(one.cov.numpy() @ two.cov.numpy())
    traces = np.trace(one.cov.numpy() + two.cov.numpy() - 2*root.real)
    wanted = (one.mean - two.mean).square().sum() + traces
    close(frechet_distance(one, two), wanted.item(), 1e-9)
    close(frechet_distance(two, one), wanted.item(), 1e-9)


@pytest.mark.parametrize("n", [30, 300])  # fewer rows than features too
def test_nothing_and_a_shift(n):
    x, shift = points(n, 64, "x"), counter_normal(2, "shift", torch.arange(1), (64,)).double()
    size = shift.square().sum().item()
    assert abs(fd(x, x)) < 1e-9 and abs(mind(x, x)) < 1e-12
    close(fd(x + shift, x), size, 1e-9)
    close(mind(x + shift, x, projections=4000), 3*size, 4*(2/4000)**0.5)
    assert precision(x, x) == recall(x, x) == density(x, x) == coverage(x, x) == 1


def test_mind_is_exact_where_there_is_one_direction():
    a, b = points(40, 1, "a"), points(40, 1, "b", 2.)
    close(mind(a, b, projections=1), 3*wasserstein_1d(a, b).item(), 1e-9)
    assert mind(points(40, 5, "a"), points(40, 5, "b"), seed=0) \
        != mind(points(40, 5, "a"), points(40, 5, "b"), seed=1)


def test_fd_where_rows_are_fewer_than_features():
    one, two = points(20, 40, "a"), points(25, 40, "b", 1.3)
    a, b = (x - x.mean(0) for x in (one, two))
    # the nuclear norm of A Bᵀ is the trace of the root, whatever the rank
    cross = torch.linalg.svdvals(a @ b.T).sum()/(19*24)**0.5
    wanted = ((one.mean(0) - two.mean(0)).square().sum() + a.square().sum()/19
              + b.square().sum()/24 - 2*cross)
    close(fd(one, two), wanted.item(), 1e-9)


def test_kid_of_a_set_with_itself_pairs_rows_with_themselves_across():
    x = points(50, 3, "x")
    close(kid(x, x), kid(x, x.clone()), 1e-9)
    assert kid(x, x) < 0


def test_kid_has_no_bias():
    found = torch.tensor([kid(counter_normal(s, "a", torch.arange(20), (4,)),
                              counter_normal(s, "b", torch.arange(15), (4,))) for s in range(400)])
    assert abs(found.mean()) < 4*found.std()/20


def test_a_copy_of_the_training_set_is_memorised():
    training, fresh = points(500, 10, "training"), points(2000, 10, "fresh")
    held_out, copies = points(1000, 10, "held_out"), training[:300] + 1e-5
    assert memorised(copies, training, held_out) == 1
    expected, error = 10/1001, (0.01*0.99*(1/2000 + 1/1000))**0.5
    assert abs(memorised(fresh, training, held_out) - expected) < 4*error
    half = memorised(fresh, training, held_out, quantile=0.5)
    assert abs(half - 0.5) < 4*(0.25*(1/2000 + 1/1000))**0.5
    assert memorised(held_out, training, held_out) == 0.01
    assert memorised(training, training, training) == 1  # where fresh images can be copies too


def test_accuracy():
    predicted, asked = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 1, 1, -1, -2])
    assert class_accuracy(predicted, asked) == 2/3
    with pytest.raises(ValueError, match="asked: found no class"):
        class_accuracy(predicted, torch.full((5,), -1))
    with pytest.raises(ValueError, match=r"predicted: found shape \(4,\)"):
        class_accuracy(predicted[:4], asked)


def test_neighbours(monkeypatch):
    x, y = points(30, 5, "x"), points(50, 5, "y")
    every, own = ((a[:, None] - y).norm(dim=2).sort(1) for a in (x, y))
    for side in (1, 3, 7, 1024):
        monkeypatch.setattr(evaluation, "_SIDE", side)
        distances, index = nearest(x, y, 4)
        assert torch.allclose(distances, every.values[:, :4], atol=1e-12)
        assert torch.equal(index, every.indices[:, :4]) and index.dtype == torch.int64
        assert torch.allclose(radii(y, 2), own.values[:, 2], atol=1e-12)
    assert torch.equal(radii(torch.zeros(4, 2), 3), torch.zeros(4).double())
    with pytest.raises(ValueError, match="k: found 51"): nearest(x, y, 51)
    with pytest.raises(ValueError, match="k: found 0"): nearest(x, y, 0)
    with pytest.raises(ValueError, match="k: found 3 with 3 rows"): radii(x[:3])


# -- what must not matter

@pytest.mark.parametrize("metric", ALL, ids=lambda f: f.__name__)
def test_order_and_chunks_do_not_matter(metric, pair, monkeypatch):
    samples, reference = pair
    wanted = metric(samples, reference)
    order = lambda x: x[counter_uniform(0, "order", torch.arange(len(x)))[:, 0].argsort()]
    close(metric(order(samples), order(reference)), wanted, 1e-9)
    for side in (50, 77):
        monkeypatch.setattr(evaluation, "_SIDE", side)
        close(metric(samples, reference), wanted, 1e-9)


@pytest.mark.parametrize("side", [2, 7, 1024])
def test_ties_are_decided_alike_in_any_chunks(side, monkeypatch):
    monkeypatch.setattr(evaluation, "_SIDE", side)
    x = points(60, 7, "x", shift=30.)
    twice = torch.cat([x, x])
    for k in (1, 2, 3): assert density(x, x, k) == 1
    assert radii(twice, 1).eq(0).all() and nearest(x, twice, 2)[0].eq(0).all()
    assert coverage(twice, twice, 1) == precision(twice, twice, 1) == 0  # no ball has an inside
    assert density(twice, twice, 2) == 1


@pytest.mark.parametrize("metric", [*SPATIAL, fd], ids=lambda f: f.__name__)
def test_a_common_shift_does_not_matter(metric, pair):
    samples, reference = pair
    close(metric(samples + 1e6, reference + 1e6), metric(samples, reference), 1e-6)


def test_moments_do_not_depend_on_batches():
    x = points(1000, 9, "x", shift=1e5)
    whole = Moments().update(x)
    assert torch.allclose(whole.cov, x.T.cov(), rtol=1e-8) and whole.cov.dtype == torch.float64
    for sizes in ([1]*1000, [999, 1], [1, 999], [300, 300, 400]):
        streamed, parts = Moments(), [Moments().update(part) for part in x.split(sizes)]
        for part in x.split(sizes): streamed.update(part)
        merged = Moments()
        for part in reversed(parts): merged.merge(part)
        for found in (streamed, merged):
            assert found.count == 1000
            assert torch.allclose(found.mean, x.mean(0), rtol=1e-12)
            assert torch.allclose(found.cov, whole.cov, rtol=1e-8, atol=1e-9)
    assert torch.equal(Moments().merge(whole).cov, whole.cov)
    before = whole.cov.clone()
    assert torch.equal(whole.merge(Moments()).cov, before)


def test_merging_leaves_the_other_alone():
    first, second = points(20, 3, "a"), points(30, 3, "b")
    other = Moments().update(second)
    mean, cov = other.mean.clone(), other.cov.clone()
    Moments().merge(other).update(first)
    Moments().update(first).merge(other)
    assert other.count == 30 and torch.equal(other.mean, mean) and torch.equal(other.cov, cov)


def test_float32_features_are_not_summed_in_float32():
    x, y = (points(400, 8, s, shift=1000.).float() for s in "ab")
    for metric in (fd, kid, mind): close(metric(x, y), metric(x.double(), y.double()), 1e-12)
    wanted = fid_statistics_to_metric(*map(fid_features_to_statistics, (x.double(), y.double())),
                                      verbose=False)["frechet_inception_distance"]
    close(fd(x, y), wanted)


# -- score

@pytest.fixture
def evidence():
    n = torch.arange(60)
    return Evidence(points(60, 4, "a"), points(70, 4, "b", 1.2), points(80, 4, "c"),
                    points(90, 4, "d"), n % 3, n % 2)


def test_score_gives_what_was_asked_for(evidence):
    e = evidence
    wanted = {f.__name__: f(e.samples, e.reference) for f in ALL}
    wanted["accuracy"] = class_accuracy(e.predicted, e.asked)
    wanted["memorised"] = memorised(e.samples, e.training, e.held_out)
    assert score(e, list(METRICS)) == wanted and list(METRICS) == list(wanted)
    assert list(score(e, ("recall", "fd"))) == ["recall", "fd"]
    better = {name: metric.better for name, metric in METRICS.items()}
    lower = {name for name in better if better[name] == "lower"}
    assert lower == {"fd", "kid", "mind", "memorised"}
    assert set(better.values()) == {"lower", "higher"}
    assert all(metric.title for metric in METRICS.values())


def test_a_metric_of_ones_own(evidence, monkeypatch):
    monkeypatch.setitem(METRICS, "rows", Metric(lambda e: len(e.samples), "higher"))
    assert score(evidence, ["rows"]) == {"rows": 60.}


def wrong(evidence, **changes): return evidence._replace(**changes)


@pytest.mark.parametrize("change, metrics, message", [
    ({}, ["fd", "fjd"], "metrics: found 'fjd'; known are fd, kid"),
    ({"training": None}, ["memorised"], "training: found none, and the metric 'memorised'"),
    ({"held_out": None}, ["memorised"], "held_out: found none"),
    ({"asked": None}, ["accuracy"], "asked: found none"),
    ({"predicted": torch.zeros(59)}, ["accuracy"], r"predicted: found shape \(59,\)"),
    ({"asked": torch.zeros(59)}, ["fd"], r"asked: found shape \(59,\)"),
    ({"samples": torch.zeros(60, 5)}, ["fd"], "reference: found 4 features a row; allowed: 5"),
    ({"training": torch.zeros(60, 5)}, ["fd"], "training: found 5 features a row; allowed: 4"),
    ({"samples": torch.zeros(60, 3, 8, 8)}, ["fd"], r"samples: found shape \(60, 3, 8, 8\)"),
    ({"samples": torch.zeros(0, 4)}, ["fd"], r"samples: found shape \(0, 4\)"),
    ({"samples": torch.zeros(1, 4), "predicted": None, "asked": None}, ["fd"],
     "samples: found 1 rows; allowed: at least 2"),
    ({"reference": torch.full((9, 4), torch.nan)}, ["fd"], "reference: found NaN or infinity in 9"),
    ({"held_out": torch.full((9, 4), -torch.inf)}, ["fd"], "held_out: found NaN or infinity in 9"),
])
def test_what_cannot_be_judged_is_refused(evidence, change, metrics, message):
    with pytest.raises(ValueError, match=message): score(wrong(evidence, **change), metrics)


def test_too_few_or_too_different_rows():
    x = points(9, 3, "x")
    with pytest.raises(ValueError, match="a covariance needs at least two"): fd(x[:1], x)
    with pytest.raises(ValueError, match="reference: found 1 rows"): kid(x, x[:1])
    with pytest.raises(ValueError, match="features: found 2 a row; allowed: 3"):
        Moments().update(x).update(x[:, :2])
    with pytest.raises(ValueError, match="quantile: found 0"): memorised(x, x, x, 0)
