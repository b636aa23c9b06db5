"Numbers by address: the same for any batch split, order, and machine."
import pytest
import torch

from diffusion_model.counters import counter_normal, counter_uniform, permutation

AT = torch.arange(100)


def test_golden_values():
    "These numbers decide what every run draws: a change of them is a change of all results."
    first = counter_uniform(0, "noise", torch.tensor([0, 1]))
    assert first.tolist() == [[0.40777796506881714], [0.8326628804206848]]


@pytest.mark.parametrize("draw", [lambda at: counter_uniform(3, "a", at, 5),
                                  lambda at: counter_normal(3, "a", at, (2, 3)),
                                  lambda at: counter_normal(3, "a", at, (7,)),
                                  lambda at: counter_normal(3, "a", at)])
def test_batch_split_and_order_do_not_matter(draw):
    whole = draw(AT)
    assert torch.equal(whole, torch.cat([draw(AT[i:i + 7]) for i in range(0, 100, 7)]))
    order = torch.randperm(100)
    assert torch.equal(whole[order], draw(AT[order]))


@pytest.mark.parametrize("change", [dict(seed=1), dict(stream="b"), dict(positions=AT + 100)])
def test_another_address_gives_other_numbers(change):
    here = dict(seed=0, stream="a", positions=AT)
    assert (counter_uniform(**here) != counter_uniform(**{**here, **change})).all()


def test_range_and_type():
    u = counter_uniform(0, "a", torch.arange(200_000), 4)
    assert u.dtype == torch.float32 and 0 <= u.min() and u.max() < 1
    assert counter_normal(0, "a", torch.arange(200_000), (4,)).isfinite().all()


def test_large_positions_and_seeds():
    far = torch.tensor([2**40, 2**62, 0])
    assert counter_normal(2**31, "a", far, (3,)).isfinite().all()
    assert len(counter_uniform(2**63, "a", far).unique()) == 3


def test_epochs_are_permutations():
    orders = [permutation(0, e, 50) for e in range(20)]
    for order in orders: assert order.sort().values.tolist() == list(range(50))
    assert len({tuple(o.tolist()) for o in orders}) == 20
    assert permutation(0, 0, 1).tolist() == [0]
