"What a network costs, counted, held against torch's counter and against measured memory."
import copy

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from diffusion_model.condition_config import ImageCondition, LabelCondition, TextCondition
from diffusion_model.config import list_configs, load_config
from diffusion_model.networks import create_network
from diffusion_model.optimizer import create_optimizer
from diffusion_model.summary import count_activations, count_flops, short, summary
from diffusion_model.unet import UNet


def unet(**change):
    torch.manual_seed(0)
    return UNet(**dict(image_size=16, channels=3, base_channels=16, channel_multipliers=(1, 2),
                       num_res_blocks=1, attention_resolutions=(8,), norm_groups=8) | change)


TOLD = {"label": LabelCondition(count=5), "caption": TextCondition(words=20, length=6, layers=1),
        "image": ImageCondition(channels=2)}


def args(network, n=1, shape=(3, 16, 16)):
    null, rows = getattr(network, "null_cond", None), None
    if isinstance(null, dict): rows = {
        "label": torch.full((n,), -1), "image": torch.zeros(n, 2, *shape[1:]),
        "caption": null["caption"].expand(n, -1)}
    elif null is not None: rows = torch.full((n,), null)
    return torch.zeros(n, *shape), torch.zeros(n), rows


@pytest.mark.parametrize("change", [
    {}, {"num_classes": 3}, {"conditions": TOLD}, {"patch_size": 2}, {"attention_resolutions": ()},
    {"attention_head_dim": 8}, {"dropout": 0.5}, {"gradient_checkpointing": True}])
def test_flops_are_those_of_torchs_counter(change):
    network = unet(**change)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(*args(network))
    s = summary(network, (3, 16, 16), batch_size=4)
    assert s.flops == counter.get_total_flops() > 0
    assert sum(row.flops for row in s.rows) == s.flops
    assert sum(row.parameters for row in s.rows) == s.parameters
    assert s.parameters == sum(p.numel() for p in network.parameters())
    assert sum(row.activations for row in s.rows) == s.activations


def test_sizes_that_are_not_square():
    tall = summary(unet(image_size=(32, 16)), (3, 32, 16))
    assert tall.rows[2].name == "conv_in" and tall.rows[2].shape == (16, 32, 16)
    assert "16 × 32 × 16" in str(tall)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_of_any_batch_follow_from_two(precision):
    network = unet(num_classes=3)
    s = summary(network, (3, 16, 16), precision=precision)
    for n in (2, 5, 9):
        kept, _ = count_activations(network, (3, 16, 16), n, precision=precision)
        assert s.memory(n)["activations"] == kept


class Two(nn.Module):
    "Its activations can be counted by hand."
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 7), nn.Linear(7, 6)
        self.frozen = nn.Parameter(torch.zeros(11), requires_grad=False)

    def forward(self, x, time, cond=None): return self.b(torch.sigmoid(self.a(x)))


def test_by_hand():
    s = summary(Two(), (6,), batch_size=10, averages=2, optimizer_values=1)
    assert [(r.name, r.kind, r.shape, r.parameters, r.flops) for r in s.rows] == [
        ("a", "Linear", (7,), 49, 84), ("b", "Linear", (6,), 48, 84),
        ("", "in between", (6,), 11, 0)]
    assert s.activations == 4*(6 + 7) and s.fixed == 0
    assert (s.parameters, s.trained) == (108, 97)
    assert s.memory() == {"weights": 432, "gradients": 388, "optimizer": 388, "averages": 864,
                          "activations": 520}
    assert s.total(0) == 432 + 388 + 388 + 864 and s.total() == s.total(0) + 520


def test_nothing_is_changed():
    "Not the mode of any part, no running mean, no random number; no gradient is left."
    network = nn.ModuleDict({"norm": nn.BatchNorm2d(3), "drop": nn.Dropout(0.5)})
    network.forward = lambda x, time, cond=None: network["drop"](network["norm"](x))
    network["drop"].eval()
    before, random = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    summary(network, (3, 4, 4), batch_size=2)
    assert torch.equal(random, torch.get_rng_state())
    assert network.training and not network["drop"].training
    for name, value in network.state_dict().items(): assert torch.equal(value, before[name])
    assert all(p.grad is None for p in network.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_dropout_keeps_its_masks():
    more, less = (summary(unet(dropout=p), (3, 16, 16)).activations for p in (0.5, 0.))
    assert more > less


def test_gradient_checkpointing_keeps_less():
    less, more = (summary(unet(gradient_checkpointing=on), (3, 16, 16)) for on in (True, False))
    assert less.activations < 0.5*more.activations and less.flops == more.flops


def test_depth_and_words():
    s = summary(unet(num_classes=3), (3, 16, 16), batch_size=1, depth=3)
    names = [row.name for row in s.rows]
    assert {"downs.0", "downs.0.resnets.0", "downs.0.resnets.0.conv1"} <= {*names}
    outer = [row for row in s.rows if "." not in row.name or row.name in (
        "downs.0", "downs.1", "ups.0", "ups.1")]
    assert sum(row.flops for row in outer) == s.flops
    assert "a step with 1 image:" in str(s)
    page = s._repr_html_()
    assert page.count("<tr>") == len(s.rows) + 2 and "(in between)" in page
    for wrong in ({"batch_size": 0}, {"depth": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: found 0; at least 1"):
            summary(Two(), (6,), **wrong)


def test_a_condition_of_ones_own():
    seen = []

    class Asks(nn.Module):
        null_cond = torch.zeros(2)

        def __init__(self):
            super().__init__()
            self.w = nn.Linear(2, 3)

        def forward(self, x, time, cond):
            seen.append(cond)
            return x + self.w(cond)

    count_flops(Asks(), (3,))
    flops, _ = count_flops(Asks(), (3,), cond=torch.tensor([4., 5.]))
    assert seen[0].tolist() == [[0, 0]] and seen[1].tolist() == [[4, 5]] and flops == 2*2*3


@pytest.mark.parametrize("amount, words", [
    (0, "0 B"), (12, "12 B"), (999.4, "999 B"), (999.6, "1.00 kB"), (1e6, "1.00 MB"),
    (123456, "123 kB"), (2.5e12, "2.50 TB")])
def test_amounts(amount, words): assert short(amount, "B") == words


def peak_bytes(f):
    "The most memory that tensors take at one time within f, beyond what was there."
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record: f()
    events = [(e.start_ns(), e.nbytes()) for e in record.profiler.kineto_results.events()
              if e.name() == "[memory]"]
    now = peak = 0
    for _, size in sorted(events): peak, now = max(peak, now + size), now + size
    return peak


@pytest.mark.parametrize("n, change", [(2, {}), (32, {}), (16, {"base_channels": 32}),
                                       (16, {"patch_size": 2, "num_classes": 4})])
def test_the_memory_of_a_step(n, change):
    "At most a fifth too much (gradients come while activations go), a tenth too little."
    training = load_config("default").training  # Adam: two numbers for each weight
    s = summary(unet(**change), (3, 16, 16), n)

    def train():
        network, average = unet(**change), unet(**change)
        optimizer = create_optimizer(training, network)
        for _ in range(2):
            network(*args(network, n)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return average

    assert 0.9 < s.total()/peak_bytes(train) < 1.2


def test_the_shipped_configs_can_be_summed_up():
    "At the least the smallest of each network."
    for name in list_configs():
        cfg = load_config(name)
        if hasattr(cfg.model, "cannot_draw") or cfg.data.space != "pixels": continue
        if cfg.data.shape[1] > 64 or getattr(cfg.model, "base_channels", 0) > 64: continue
        s = summary(create_network(cfg.model, cfg.data.shape), cfg.data.shape, 2)
        assert s.flops > 0 and s.shape == cfg.data.shape
