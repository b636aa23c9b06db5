"Averaged weights: edges and errors."
import pytest
import torch
from torch import nn

from diffusion_model.ema import EMA


def network(): return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


@pytest.mark.parametrize("decay", [-0.1, 1., 1.5, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="0 <= decay < 1"): EMA(network(), decay)


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


def test_a_run_goes_on_the_same_after_a_reload():
    def step(net, n):
        torch.manual_seed(n)
        with torch.no_grad():
            for p in net.parameters(): p.add_(torch.randn_like(p))
    one, two = network(), network()
    two.load_state_dict(one.state_dict())
    a, b = EMA(one, 0.9), EMA(two, 0.9)
    for n in range(6):
        for net, ema in ((one, a), (two, b)):
            step(net, n)
            ema.update(n)
        if n == 2:
            fresh = EMA(two, 0.9)
            fresh.load_state_dict(b.state_dict())
            b = fresh
    for p, q in zip(a.network.parameters(), b.network.parameters()): assert torch.equal(p, q)
