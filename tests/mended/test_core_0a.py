"Faults of the schedule, the denoiser and the oracle that were found and mended."
import itertools

import pytest
import torch
from devices import apple
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion_model.denoiser import (PREDICTIONS, WEIGHTINGS, Denoiser, clamped, diffusion_loss,
                                      loss_weight, thresholded)
from diffusion_model.oracle import GaussianMixture
from diffusion_model.scheduler import (SPACINGS, TIMESTEPS, FlowSchedule, VESchedule, VPSchedule,
                                       cosine_betas, expand, linear_betas)

LINEAR, COSINE = VPSchedule(linear_betas()), VPSchedule(cosine_betas())
ZERO, FLOW, VE = VPSchedule(linear_betas(), zero_terminal=True), FlowSchedule(), VESchedule()
ALL = {"linear": LINEAR, "cosine": COSINE, "zero": ZERO, "flow": FLOW, "ve": VE}
U = (torch.arange(16) + 0.5)/16


# 5: a device without float64 and without the inverse of the normal distribution function
def test_the_emulated_device_refuses():
    with apple():
        x = torch.ones(3, device="mps")
        assert x.device.type == "mps" and (2*x + 1).device.type == "mps"
        for wrong in (lambda: x.double(), lambda: x*torch.tensor(2., dtype=torch.float64),
                      lambda: torch.zeros(3, dtype=torch.float64, device="mps")):
            with pytest.raises((TypeError, RuntimeError)): wrong()
        with pytest.raises(NotImplementedError): torch.special.ndtri(x)
        with pytest.raises(RuntimeError, match="same device"): x + torch.ones(3)
        assert (x.cpu() + torch.ones(3)).tolist() == [2., 2., 2.]


def on_mps(*tensors): return [t.to("mps", torch.float32) for t in tensors]


def answers(schedule, t):
    "All that a schedule says of times."
    log_snr = schedule.log_snr(t)
    return (*schedule.alpha_sigma(t), log_snr, schedule.t_of_log_snr(log_snr),
            schedule.network_time(t))


@pytest.mark.mended(5)
@pytest.mark.parametrize("name, how, where", list(
    itertools.product(ALL, TIMESTEPS, ("cpu", "mps"))))
def test_schedules_on_a_device_without_float64(name, how, where):
    "Times and levels may come from the CPU or from the device: the numbers are the same."
    schedule, (x0, noise) = ALL[name], torch.randn(2, 16, 3, 4)
    t = schedule.sample_timesteps(U, how)
    wanted = answers(schedule, t)
    images = schedule.add_noise(x0, noise, t), *schedule.posterior(x0, noise, t, t/2)
    with apple():
        drawn = schedule.sample_timesteps(U.to("mps"), how)
        assert drawn.device.type == "mps" and torch.equal(drawn.cpu(), t)
        at, given = drawn if where == "mps" else t, on_mps(x0, noise)
        for a, b in zip(answers(schedule, at), wanted): assert torch.equal(a.cpu(), b)
        got = schedule.add_noise(*given, at), *schedule.posterior(*given, at, at/2)
        assert all(v.device.type == "mps" for v in got)
        for a, b in zip(got, images): assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("name, spacing", list(itertools.product(ALL, SPACINGS)))
def test_grids_where_there_is_a_device_without_float64(name, spacing):
    if not ALL[name].T and spacing == "leading": return
    grid = ALL[name].grid(5, spacing)
    with apple(): assert torch.equal(ALL[name].grid(5, spacing), grid)


class Net(torch.nn.Module):
    num_classes, null_cond = 3, -1
    def __init__(self):
        super().__init__()
        self.layer, self.emb = torch.nn.Linear(12, 12), torch.nn.Embedding(4, 12)
    def forward(self, x, time, cond):
        return (self.layer(x.flatten(1)) + self.emb(cond % 4) + time[:, None]/1000).view_as(x)


@pytest.mark.mended(5)
@pytest.mark.parametrize("name, prediction, where", list(
    itertools.product(ALL, PREDICTIONS, ("cpu", "mps"))))
def test_denoiser_and_loss_on_a_device_without_float64(name, prediction, where):
    "A training step's loss and its gradient, predictions and their limits, with every weighting."
    schedule = ALL[name]
    if name in ("zero", "flow") and prediction == "eps": return
    torch.manual_seed(0)
    net, (x0, noise), cond = Net(), torch.randn(2, 16, 3, 4), torch.arange(16) % 3
    denoiser, t = Denoiser(net, schedule, prediction), schedule.sample_timesteps(U)

    def results(x0, noise, t, cond, one):
        denoiser.zero_grad()
        losses = [diffusion_loss(denoiser, x0, noise, t, cond, weighting=w) for w in WEIGHTINGS]
        sum(losses).mean().backward()
        gradients = [p.grad for p in denoiser.network.parameters()]
        with torch.no_grad():
            limits = [limit(denoiser)(x0, at, cond) for limit in (clamped, thresholded)
                      for at in (t, one)]
            return tree_leaves((losses, gradients, denoiser(x0, t, cond),
                                denoiser(x0, one, cond), limits))

    wanted = results(x0, noise, t, cond, t[0])
    waits = []
    with apple(waits):
        denoiser.network = net.to("mps")
        given = *on_mps(x0, noise), t.to("mps") if where == "mps" else t, cond.to("mps")
        got = results(*given, t[0])
        assert all(v.device.type == "mps" for v in got)
        if where == "cpu": assert not waits, "times on the CPU: nothing is fetched from the device"
        for a, b in zip(got, wanted): assert torch.allclose(a.cpu(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.mended(5)
@pytest.mark.parametrize("per_image", [False, True])
def test_the_oracle_on_a_device_without_float64(per_image):
    means, x = torch.randn(2, 9, 3, 4)
    t = torch.arange(100, 1000, 100) if per_image else torch.tensor(400)
    for kind in (torch.float32, torch.float64):  # the data set may lie on the CPU, in float64
        oracle = GaussianMixture(COSINE, means.to(kind), 0.2)
        with apple():
            pred, log = oracle(x.to("mps"), t), oracle.log_prob(x.to("mps"), t)
        for a, b in zip((*pred, log), (*oracle(x, t), oracle.log_prob(x, t))):
            assert torch.allclose(a.held, b.float(), atol=1e-5)


@pytest.mark.mended(5)
def test_coefficients_go_where_the_images_are():
    with apple():
        x = torch.ones(4, 2, 2, device="mps")
        for coef in (torch.arange(4).double(), torch.tensor(2.).double()):
            made = expand(coef, x)
            assert (made*x).device.type == "mps" and (made*x).dtype == torch.float32
    for kind in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.ones(4, 2, 2, dtype=kind)
        assert (expand(torch.arange(4).double(), x)*x).dtype == kind
        assert (expand(torch.tensor(2.).double(), x)*x).dtype == kind


# 13: the memory of the oracle with one time for each image
class Largest(TorchDispatchMode):
    "The size of the largest tensor that is made within."
    numel = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [v.numel() for v in tree_leaves(out) if isinstance(v, torch.Tensor)]
        self.numel = max([self.numel, *made])
        return out


@pytest.mark.mended(13)
@pytest.mark.parametrize("K, chunk", [(64, 16), (5, 16), (64, 1), (7, 1000)])
def test_a_chunk_bounds_the_memory_with_a_time_for_each_image(K, chunk):
    B, D, generator = 24, 100, torch.Generator().manual_seed(0)
    means = torch.randn(K, D, generator=generator, dtype=torch.float64)
    x = torch.randn(B, D, generator=generator, dtype=torch.float64)
    t, labels = torch.arange(B)*40 + 20, torch.arange(K) % 2
    oracle = GaussianMixture(COSINE, means, 0.3, labels=labels, chunk=chunk)
    for cond in (None, torch.arange(B) % 3 - 1):
        with Largest() as largest: pred = oracle(x, t, cond)
        assert largest.numel <= max(chunk, B)*D  # the images, or a chunk of differences
        with Largest() as largest: log = oracle.log_prob(x, t, cond)
        assert largest.numel <= max(chunk, B)*D
        for i in range(B):  # the same numbers as each image alone
            given = x[i:i + 1], t[i], None if cond is None else cond[i:i + 1]
            for a, b in zip(pred, oracle(*given)): assert torch.allclose(a[i:i + 1], b, atol=1e-10)
            assert torch.allclose(log[i:i + 1], oracle.log_prob(*given), atol=1e-9)


# 15: checks that could not fail
@pytest.mark.mended(15)
@pytest.mark.parametrize("sigma_data", [0.5, 0.3])
def test_edm_is_edms_own_training(sigma_data):
    "Preconditioning, loss and weight as the paper's Eqs. 7 and 8 and Table 1 write them."
    torch.manual_seed(0)
    net = torch.nn.Linear(6, 6).double()
    y, n = torch.randn(2, 50, 6, dtype=torch.float64)
    sigma = torch.logspace(-2.5, 1.8, 50, dtype=torch.float64)
    r, d2 = sigma[:, None], sigma_data**2
    c_skip, c_in = d2/(r**2 + d2), 1/(r**2 + d2).sqrt()
    c_out, weight = r*sigma_data*c_in, (r**2 + d2)/(r*sigma_data)**2
    D = c_skip*(y + r*n) + c_out*net(c_in*(y + r*n))
    denoiser = Denoiser(lambda x, time, cond: net(x), VE, "edm", sigma_data)
    assert torch.allclose(denoiser(y + r*n, sigma).x0, D, atol=1e-10)
    paper = (weight*(D - y)**2).mean(1)
    loss = diffusion_loss(denoiser, y, n, sigma, weighting="edm")
    assert torch.allclose(loss, paper, rtol=1e-9)


@pytest.mark.mended(15)
@pytest.mark.parametrize("name, prediction, scaled", [
    *((name, "edm", True) for name in ALL), *(("ve", p, True) for p in PREDICTIONS),
    ("cosine", "v", False), ("linear", "eps", False), ("flow", "flow", False),
    ("zero", "x0", False)])
def test_the_network_is_shown_unit_size(name, prediction, scaled):
    "x_t/S for data of every size, at levels where neither signal nor noise can be left out."
    schedule, seen = ALL[name], []
    t = schedule.t_of_log_snr(torch.tensor([4., 1.4, 0., -1.], dtype=torch.float64))
    for sigma_data in (0.5, 2.):
        x0, z = torch.randn(2, 4, 50_000, generator=torch.Generator().manual_seed(0)).double()
        def network(x, time, cond):
            seen.append(x)
            return x
        x_t = schedule.add_noise(sigma_data*x0, z, t)
        Denoiser(network, schedule, prediction, sigma_data)(x_t, t)
        if scaled: assert (seen[-1].std(1) - 1).abs().max() < 0.02
        else: assert seen[-1] is x_t


# Beside 21: where EDM's weighting has a bound, so that a config may have it
@pytest.mark.parametrize("name", ALL)
def test_where_edms_weighting_has_a_bound(name):
    "Its weight stays near 1 for v, flow and edm on every schedule; for the others it does not."
    t = ALL[name].sample_timesteps((torch.arange(20_000) + 0.5)/20_000)
    for prediction in ("v", "flow", "edm"):
        assert loss_weight(Denoiser(None, ALL[name], prediction), t, "edm").max() < 6.2
    assert loss_weight(Denoiser(None, ALL[name], "x0"), t, "edm").max() > 9000
    for weighting in ("uniform", "min_snr", "sigmoid"):
        assert loss_weight(Denoiser(None, ALL[name], "x0"), t, weighting).max() < 8
