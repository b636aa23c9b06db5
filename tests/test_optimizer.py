"Optimizers, parameter groups and learning rates: edges and errors."
import copy, math, sys

import pytest
import torch
from torch import nn

from diffusion_model.config import TrainingConfig
from diffusion_model.optimizer import (LR_SCHEDULES, OPTIMIZERS, create_optimizer, learning_rate,
                                       parameter_groups, restore_optimizer, set_learning_rate)


def training(**fields):
    base = dict(max_steps=100, learning_rate=1., warmup_steps=0, lr_schedule="constant",
                optimizer="adamw", weight_decay=0.1)
    return TrainingConfig(**{**base, **fields})


class Everything(nn.Module):
    "One of each kind of parameter, one of them shared by two modules."
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.gn, self.ln = nn.GroupNorm(2, 4), nn.LayerNorm([4, 2])
        self.emb, self.out = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.out.weight = self.emb.weight                # tied
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_every_parameter_exactly_once_and_where_it_belongs():
    network = Everything()
    names = {id(p): n for n, p in network.named_parameters()}
    decayed, spared = parameter_groups(network, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.)
    found = [names[id(p)] for g in (decayed, spared) for p in g["params"]]
    assert sorted(found) == sorted(set(names.values()) - {"frozen"})
    assert {names[id(p)] for p in decayed["params"]} == {
        "conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"}


@pytest.mark.mended(3)
def test_what_is_frozen_is_left_alone():
    "Only what is trained is in a group, so that every parameter of the optimizer gets a gradient."
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    network[0].requires_grad_(False)
    network[2].bias.requires_grad_(False)
    before = [p.detach().clone() for p in network.parameters()]
    optimizer = create_optimizer(training(), network)
    network(torch.randn(5, 3)).square().sum().backward()
    assert all(p.grad is not None for g in optimizer.param_groups for p in g["params"])
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, network.parameters())]
    assert moved == [p.requires_grad for p in network.parameters()] == [False, False, True, True,
                                                                        True, False]


@pytest.mark.mended(3)
def test_a_network_that_is_frozen_as_a_whole_says_so():
    with pytest.raises(ValueError,
                       match="Linear has no parameter to train: 2 are there, all frozen"):
        create_optimizer(training(), nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.mended(3)
def test_a_frozen_table_of_whole_numbers_does_not_slow_the_rest():
    "Fused is chosen by what is trained, whatever else the network holds."
    network = nn.Linear(2, 2)
    network.table = nn.Parameter(torch.arange(4), requires_grad=False)
    assert create_optimizer(training(), network).param_groups[0]["fused"] is True


@pytest.mark.mended(18)
@pytest.mark.parametrize("state", [None, {}])
def test_a_checkpoint_without_an_optimizer_is_refused_in_our_words(state):
    with pytest.raises(ValueError,
                       match="holds no optimizer state.*Start another run from its weights"):
        restore_optimizer(create_optimizer(training(), nn.Linear(2, 2)), state)


def test_a_network_without_kernels_gives_one_group():
    assert [g["weight_decay"] for g in parameter_groups(nn.LayerNorm(4), 0.1)] == [0.]


def test_a_network_without_parameters_is_an_error():
    with pytest.raises(ValueError, match="ReLU has no parameter to train: 0 are there"):
        create_optimizer(training(), nn.ReLU())


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in ("lion", "muon")])
def test_created_optimizers(name):
    network = nn.Linear(3, 2)
    run = training(optimizer=name, beta1=0.8, beta2=0.95, warmup_steps=10)
    optimizer = create_optimizer(run, network)
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.1                                # the first of ten warm-up steps
    if name == "sgd": assert group["momentum"] == 0.8
    else: assert tuple(group["betas"]) == (0.8, 0.95)
    reference = copy.deepcopy(network)
    kind, betas = {"adamw": (torch.optim.AdamW, True), "adam": (torch.optim.Adam, True),
                   "sgd": (torch.optim.SGD, False)}[name]
    plain = kind(parameter_groups(reference, 0.1), lr=0.1, foreach=False,
                 **(dict(betas=(0.8, 0.95)) if betas else dict(momentum=0.8)))
    for step in range(5):
        for net, opt in ((network, optimizer), (reference, plain)):
            torch.manual_seed(step)
            opt.zero_grad()
            net(torch.randn(4, 3)).square().sum().backward()
            opt.step()
    for a, b in zip(network.parameters(), reference.parameters()): torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_turns_kernels_as_matrices_and_resumes(layout):
    "A kernel of 3×3 places is the matrix of its rows; torch's Muon takes matrices only."
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3)
    matrix = nn.Parameter(conv.weight.detach().flatten(1).clone())
    bias = nn.Parameter(conv.bias.detach().clone())
    start = matrix.detach().clone()
    conv.to(memory_format=layout)
    run = training(optimizer="muon", learning_rate=0.02)
    optimizer = create_optimizer(run, conv)
    whole = torch.optim.Muon([matrix], 0.02, 0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    rest = torch.optim.AdamW([bias], 0.02, weight_decay=0.)
    for step in range(8):
        torch.manual_seed(step)
        optimizer.zero_grad()
        conv(torch.randn(2, 3, 8, 8)).square().mean().backward()
        matrix.grad, bias.grad = conv.weight.grad.flatten(1).clone(), conv.bias.grad.clone()
        for each in (optimizer, whole, rest): each.step()
        if step == 3:
            state, optimizer = optimizer.state_dict(), create_optimizer(run, conv)
            restore_optimizer(optimizer, state)
    assert (conv.weight.flatten(1) - matrix).norm() < 0.02*(matrix - start).norm()
    torch.testing.assert_close(conv.bias, bias)


def test_lion_is_the_papers_algorithm_and_resumes():
    pytest.importorskip("lion_pytorch")
    run = training(optimizer="lion", learning_rate=0.01, beta2=0.99)
    network = nn.Linear(3, 2).double()
    optimizer = create_optimizer(run, network)
    w, b = network.weight.detach().clone(), network.bias.detach().clone()
    m, k = torch.zeros_like(w), torch.zeros_like(b)
    for step in range(6):
        torch.manual_seed(step)
        optimizer.zero_grad()
        network(torch.randn(4, 3, dtype=torch.float64)).square().sum().backward()
        g, h = network.weight.grad.clone(), network.bias.grad.clone()
        optimizer.step()
        w = w*(1 - 0.01*0.1) - 0.01*(0.9*m + 0.1*g).sign()
        b = b - 0.01*(0.9*k + 0.1*h).sign()                  # a bias does not decay
        m, k = 0.99*m + 0.01*g, 0.99*k + 0.01*h
        if step == 2:
            state, optimizer = optimizer.state_dict(), create_optimizer(run, network)
            restore_optimizer(optimizer, state)
    torch.testing.assert_close(network.weight.detach(), w, rtol=0, atol=1e-12)
    torch.testing.assert_close(network.bias.detach(), b, rtol=0, atol=1e-12)


def test_without_its_library_lion_says_what_to_do_and_the_others_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "lion_pytorch", None)
    with pytest.raises(ImportError,
                       match=r"lion-pytorch: pip install 'diffusion_model\[lion\]', or .* adamw"):
        create_optimizer(training(optimizer="lion"), nn.Linear(1, 1))
    for name in OPTIMIZERS:
        if name != "lion": create_optimizer(training(optimizer=name), nn.Linear(1, 1))


def test_unknown_names_are_refused_with_what_is_allowed():
    with pytest.raises(ValueError, match="'lars'; allowed: adamw, adam, sgd, lion"):
        create_optimizer(training().model_copy(update={"optimizer": "lars"}), nn.Linear(1, 1))
    with pytest.raises(ValueError,
                       match="'exp'; allowed: constant, linear, cosine, step, inverse_sqrt"):
        learning_rate(0, training().model_copy(update={"lr_schedule": "exp"}))


@pytest.mark.parametrize("name", LR_SCHEDULES)
@pytest.mark.parametrize("max_steps", [1, 2, 3, 20, 200])
@pytest.mark.parametrize("warmup", [0, 1, 19, 20, 21, 5000])
def test_a_rate_is_positive_bounded_and_reaches_the_peak(name, max_steps, warmup):
    run = training(lr_schedule=name, max_steps=max_steps, warmup_steps=warmup, min_lr_ratio=0.1)
    rates = [learning_rate(s, run) for s in range(max_steps)]
    assert all(0 < r <= 1 and math.isfinite(r) for r in rates)
    assert max(rates) == 1.


def test_landmarks():
    run = training(warmup_steps=10, lr_schedule="cosine", min_lr_ratio=0.2)
    assert [learning_rate(s, run) for s in (0, 4, 9, 10)] == [0.1, 0.5, 1., 1.]
    assert learning_rate(55, run) == pytest.approx(0.6)           # half-way between 1 and 0.2
    assert learning_rate(100, run) == learning_rate(10**9, run) == pytest.approx(0.2)
    line = training(warmup_steps=10, lr_schedule="linear", min_lr_ratio=0.2)
    assert [learning_rate(s, line) for s in (0, 9, 10)] == [0.1, 1., 1.]
    assert learning_rate(28, line) == pytest.approx(0.84)         # a fifth of the way from 1 to 0.2
    assert learning_rate(100, line) == learning_rate(10**9, line) == pytest.approx(0.2)
    root = training(warmup_steps=10, lr_schedule="inverse_sqrt")
    assert [learning_rate(s, root) for s in (0, 9, 10, 40, 90, 1000)] == pytest.approx(
        [0.1, 1., 1., 1/2, 1/3, 1/10])
    bare = training(lr_schedule="inverse_sqrt")                   # without a warm-up: from step 1
    assert [learning_rate(s, bare) for s in (0, 1, 4, 25)] == pytest.approx([1., 1., 1/2, 1/5])
    steps = training(lr_schedule="step", lr_step_size=30, lr_gamma=0.5)
    assert [learning_rate(s, steps) for s in (0, 29, 30, 60, 99)] == [1, 1, 0.5, 0.25, 0.125]


def test_set_learning_rate_reaches_all_groups_and_tensors():
    optimizer = create_optimizer(training(), nn.Linear(2, 2))
    optimizer.param_groups[1]["lr"] = torch.tensor(1.)
    set_learning_rate(optimizer, 0.25)
    assert [float(g["lr"]) for g in optimizer.param_groups] == [0.25, 0.25]
    assert isinstance(optimizer.param_groups[1]["lr"], torch.Tensor)


def test_restoring_keeps_this_runs_settings():
    network = nn.Linear(3, 2)
    optimizer = create_optimizer(training(), network)
    network(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    state["param_groups"][0]["fused"] = None                     # as saved on another device
    new = create_optimizer(training(learning_rate=0.5, weight_decay=0.3, beta1=0.5), network)
    restore_optimizer(new, state)
    assert [g["weight_decay"] for g in new.param_groups] == [0.3, 0.]
    assert (new.param_groups[0]["lr"], new.param_groups[0]["betas"]) == (0.5, (0.5, 0.999))
    assert new.param_groups[0]["fused"] is True
    for p in network.parameters():
        assert torch.equal(new.state[p]["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])


def test_restoring_another_networks_state_is_refused():
    state = create_optimizer(training(), nn.Linear(3, 2)).state_dict()
    other = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"\[1, 1\].*\[2, 2\]"):
        restore_optimizer(create_optimizer(training(), other), state)


@pytest.mark.parametrize("before, now", [("sgd", "adam"), ("adamw", "sgd")])
def test_restoring_another_kinds_state_is_refused(before, now):
    state = create_optimizer(training(optimizer=before), nn.Linear(3, 2)).state_dict()
    with pytest.raises(ValueError, match="put training.optimizer back"):
        restore_optimizer(create_optimizer(training(optimizer=now), nn.Linear(3, 2)), state)


def test_adam_and_adamw_share_their_moments():
    network = nn.Linear(3, 2)
    one = create_optimizer(training(optimizer="adam"), network)
    network(torch.randn(4, 3)).sum().backward()
    one.step()
    two = create_optimizer(training(optimizer="adamw"), network)
    restore_optimizer(two, one.state_dict())
    for p in network.parameters():
        assert torch.equal(one.state[p]["exp_avg"], two.state[p]["exp_avg"])
