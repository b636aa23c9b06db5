"Averaged weights: edges and errors."
import numpy as np
import pytest
import torch
from torch import nn

from diffusion_model.config import TrainingConfig
from diffusion_model.ema import EMA, create_emas, sigma_rel_to_gamma


def network(): return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


@pytest.mark.parametrize("decay", [-0.1, 1., 1.5, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="0 <= decay < 1"): EMA(network(), decay)


@pytest.mark.parametrize("width", [-0.1, 0., 0.29, 1., float("nan")])
def test_a_width_outside_its_range_is_refused(width):
    with pytest.raises(ValueError, match="0 < sigma_rel <= 0.288"): EMA(network(), sigma_rel=width)


def test_the_papers_exponents_and_the_limits():
    assert sigma_rel_to_gamma(0.05) == pytest.approx(16.9722, abs=5e-5)
    assert sigma_rel_to_gamma(0.10) == pytest.approx(6.9372, abs=5e-5)
    assert sigma_rel_to_gamma(12**-0.5) == pytest.approx(0., abs=1e-9)
    for gamma in (0.01, 1., 8., 1e3, 1e6):
        width = ((gamma + 1)/((gamma + 2)**2*(gamma + 3)))**0.5
        assert sigma_rel_to_gamma(width) == pytest.approx(gamma, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("width, n", [(0.05, 40), (0.05, 400), (0.2, 40)])
def test_a_power_average_weighs_the_steps_of_a_run_as_it_should(width, n):
    "The trained weight is 1 in one step of the run and 0 in all others: the average is its weight."
    gamma, found = sigma_rel_to_gamma(width), []
    for i in range(n):
        net = nn.Linear(1, 1, bias=False).double()
        ema = EMA(net, sigma_rel=width)                      # the random start must leave no trace
        for step in range(n):
            with torch.no_grad(): net.weight.fill_(float(step == i))
            ema.update(step)
        found.append(ema.network.weight.item())
    expected = np.diff(np.linspace(0, 1, n + 1)**(gamma + 1))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)


def test_a_plain_mean_is_the_widest():
    net = nn.Linear(1, 1, bias=False).double()
    ema = EMA(net, sigma_rel=12**-0.5)
    for step in range(10):
        with torch.no_grad(): net.weight.fill_(step)
        ema.update(step)
    assert ema.network.weight.item() == pytest.approx(4.5, rel=1e-9)


def test_decay_zero_follows_exactly():
    net = network()
    ema = EMA(net, 0.)
    with torch.no_grad():
        for p in net.parameters(): p.add_(1.5)
    ema.update(0)
    for a, b in zip(ema.network.parameters(), net.parameters()): assert torch.equal(a, b)


def test_the_ramp_and_its_end():
    ema = EMA(network(), 0.9)
    assert ema.decay_at(0) == 0.1 and ema.decay_at(8) == 0.5 and ema.decay_at(10**6) == 0.9


def test_one_update_is_the_formula_and_in_place():
    net = network()
    ema = EMA(net, 0.999)
    where = [p.data_ptr() for p in ema.network.parameters()]
    old = [p.clone() for p in ema.network.parameters()]
    with torch.no_grad():
        for p in net.parameters(): p.add_(torch.randn_like(p))
    ema.update(90)
    d = 91/100
    for mine, before, new in zip(ema.network.parameters(), old, net.parameters()):
        torch.testing.assert_close(mine, d*before + (1 - d)*new)
    assert where == [p.data_ptr() for p in ema.network.parameters()]


def test_the_copy_is_in_eval_mode_without_gradients():
    net = network()
    net(torch.randn(5, 3)).sum().backward()
    ema = EMA(net)
    assert not any(m.training for m in ema.network.modules()) and net.training
    assert all(p.grad is None and not p.requires_grad for p in ema.network.parameters())
    assert all(p.grad is not None and p.requires_grad for p in net.parameters())


def test_buffers_are_copied_of_any_type_and_persistence():
    net = network()
    net.register_buffer("table", torch.zeros(3), persistent=False)
    net.register_buffer("flag", torch.tensor(False))
    ema = EMA(net, 0.9999)
    net(torch.randn(5, 3))
    net.table.fill_(7.)
    net.flag.fill_(True)
    ema.update(10**6)
    assert ema.network.table.tolist() == [7.]*3 and ema.network.flag
    assert ema.network[1].num_batches_tracked == 1
    assert torch.equal(ema.network[1].running_mean, net[1].running_mean)


def test_a_network_without_buffers_and_one_with_tied_weights():
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    net[1].weight = net[0].weight
    ema = EMA(net)
    with torch.no_grad(): net[0].weight.add_(1.)
    before = ema.network[0].weight.clone()
    ema.update(0)
    torch.testing.assert_close(ema.network[0].weight, before + 0.9)   # once, not twice
    assert ema.network[0].weight is ema.network[1].weight


def test_weights_replaced_by_load_state_dict_assign_are_followed():
    net = network()
    ema = EMA(net, 0.)
    net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}, assign=True)
    ema.update(0)
    assert torch.equal(ema.network[0].weight, net[0].weight)


def test_swapping_is_exact_also_after_an_error_and_for_another_object():
    net = network().eval()
    ema, x = EMA(net), torch.randn(5, 3)
    with torch.no_grad(): net[0].weight.add_(1.)
    trained, averaged = net(x), ema.network(x)
    assert not torch.equal(trained, averaged)
    with pytest.raises(KeyError):
        with ema.swapped() as lent:
            assert lent is net and torch.equal(net(x), averaged)
            raise KeyError
    assert torch.equal(net(x), trained) and torch.equal(ema.network(x), averaged)
    other = network().eval()
    with ema.swapped(other): assert torch.equal(other(x), averaged)


def test_nothing_else_while_swapped():
    ema = EMA(network())
    with ema.swapped():
        with pytest.raises(RuntimeError, match="leave"): ema.update(0)
        with pytest.raises(RuntimeError, match="already"): ema.swapped().__enter__()
    ema.update(0)


def test_one_average_lent_stops_the_others_of_that_network_only():
    net, other = network(), EMA(network())
    one, two = EMA(net), EMA(net, sigma_rel=0.1)
    before = [p.clone() for p in two.network.parameters()]
    with one.swapped():
        with pytest.raises(RuntimeError, match="leave"): two.update(0)
        with pytest.raises(RuntimeError, match="already"): two.swapped().__enter__()
        other.update(0)
        with other.swapped(): pass
    for a, b in zip(two.network.parameters(), before): assert torch.equal(a, b)
    two.update(0)
    with two.swapped(): pass


def test_swapping_with_another_architecture_changes_nothing():
    ema = EMA(network())
    before = {k: v.clone() for k, v in ema.state_dict().items()}
    with pytest.raises(ValueError):
        with ema.swapped(nn.Linear(3, 4)): pass
    for k, v in ema.state_dict().items(): assert torch.equal(v, before[k])


def test_state_goes_round_and_wrong_state_is_refused():
    net = network()
    ema, other = EMA(net), EMA(network())
    other.load_state_dict(ema.state_dict())
    for a, b in zip(ema.network.parameters(), other.network.parameters()): assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="Missing"): other.load_state_dict({})


@pytest.mark.parametrize("kind", [dict(decay=0.9), dict(sigma_rel=0.1)])
def test_a_run_goes_on_the_same_after_a_reload(kind):
    def step(net, n):
        torch.manual_seed(n)
        with torch.no_grad():
            for p in net.parameters(): p.add_(torch.randn_like(p))
    one, two = network(), network()
    two.load_state_dict(one.state_dict())
    a, b = EMA(one, **kind), EMA(two, **kind)
    for n in range(6):
        for net, ema in ((one, a), (two, b)):
            step(net, n)
            ema.update(n)
        if n == 2:
            fresh = EMA(two, **kind)
            fresh.load_state_dict(b.state_dict())
            b = fresh
    for p, q in zip(a.network.parameters(), b.network.parameters()): assert torch.equal(p, q)


def emas(**fields): return create_emas(TrainingConfig(**fields), network())


def test_the_averages_that_a_config_asks_for():
    assert {k: (e.decay, e.gamma) for k, e in emas().items()} == {"ema": (0.9999, None)}
    found = emas(ema_decay=0.5, ema_more=[0.9999, 0.99, 0.00001])
    assert [(k, e.decay) for k, e in found.items()] == [
        ("ema", 0.5), ("ema_0.9999", 0.9999), ("ema_0.99", 0.99), ("ema_1e-05", 0.00001)]
    found = emas(ema_sigma_rel=0.05, ema_more=[0.1], ema_decay=0.)
    assert [(k, round(e.gamma, 4)) for k, e in found.items()] == [("ema", 16.9722),
                                                                  ("ema_0.1", 6.9372)]


@pytest.mark.parametrize("fields, name", [
    (dict(ema_decay=0.99, ema_more=[0.9, 0.99]), "ema_0.99"),
    (dict(ema_more=[0.9, 0.9]), "ema_0.9"),
    (dict(ema_sigma_rel=0.1, ema_more=[0.1]), "ema_0.1"),
    (dict(ema_more=[0.99, 0.99000001]), "ema_0.99"),         # two, but one file name
])
def test_an_average_that_stands_twice_is_refused(fields, name):
    with pytest.raises(ValueError, match=rf"training.ema_more: .*; {name} stands twice"):
        emas(**fields)


def test_a_decay_among_widths_is_refused():
    with pytest.raises(ValueError, match="sigma_rel of the EMA is 0.999"):
        emas(ema_sigma_rel=0.1, ema_more=[0.999])


def test_several_averages_are_what_each_is_alone():
    net = network()
    several = create_emas(TrainingConfig(ema_sigma_rel=0.05, ema_more=[0.1, 0.2]), net)
    alone = [EMA(net, sigma_rel=s) for s in (0.05, 0.1, 0.2)]
    for step in range(5):
        with torch.no_grad():
            for p in net.parameters(): p.add_(torch.randn_like(p))
        for ema in (*several.values(), *alone): ema.update(step)
    for a, b in zip(several.values(), alone):
        for p, q in zip(a.network.parameters(), b.network.parameters()): assert torch.equal(p, q)
    assert not torch.equal(several["ema"].network[0].weight, several["ema_0.1"].network[0].weight)
