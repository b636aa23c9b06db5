"Conditions: padding has no say, nulls are finite, every parameter learns, and what is refused."
import copy

import pytest
import torch
from torch import nn

from diffusion_model.condition_config import (
    ImageCondition, LabelCondition, TextCondition, TokenCondition, VectorCondition,
    check_conditions)
from diffusion_model.conditions import EMBEDDERS, _NO_CAPTION, Conditions
from diffusion_model.denoiser import Denoiser
from diffusion_model.guidance import check_cond, drop_cond, guided
from diffusion_model.scheduler import FlowSchedule

KINDS = {"label": LabelCondition(count=3), "place": VectorCondition(size=2),
         "caption": TextCondition(words=20, length=5, width=8, heads=2),
         "told": TokenCondition(length=4, size=6), "image": ImageCondition(channels=2)}


@pytest.fixture
def every():
    torch.manual_seed(0)
    return Conditions(0, KINDS, 16, 12)


def some(n=4):
    "A condition of each kind; the last sample's are all null."
    torch.manual_seed(1)
    cond = {"label": torch.arange(n) % 3, "place": torch.randn(n, 2),
            "caption": torch.randint(3, 20, (n, 5)), "told": torch.randn(n, 4, 6),
            "image": torch.randn(n, 2, 8, 12)}
    cond["caption"][0, 3:], cond["told"][0, 2:] = 0, 0
    null = Conditions(0, KINDS, 16).null_cond
    return drop_cond(cond, (torch.arange(n) < n - 1).float(), 0.5, null)


def test_every_kind_has_an_embedder():
    assert {type(c): c.kind for c in KINDS.values()}.keys() == {
        type(c) for c in KINDS.values()} and {c.kind for c in KINDS.values()} == {*EMBEDDERS}


def test_what_it_says(every):
    assert (every.num_classes, every.image_channels) == (3, 2)
    assert every.has_tokens and every.has_vector
    assert every.null_cond["label"] == -1 and _NO_CAPTION == 2
    assert every.null_cond["caption"].tolist() == [2, 0, 0, 0, 0]
    for name, shape in {"place": (2,), "told": (4, 6), "image": (2, 1, 1)}.items():
        assert torch.equal(every.null_cond[name], torch.zeros(shape))
    images = Conditions(0, {"image": ImageCondition(channels=4)}, 16)
    assert (images.has_tokens, images.has_vector, images.image_channels) == (False, False, 4)
    nothing = Conditions(0, {}, 16)
    assert nothing.null_cond is None and nothing.num_classes == 0 and nothing(None) == (None,)*4
    assert not nothing.has_vector and not [*nothing.parameters()]


def test_labels_without_a_name():
    "As networks had them before: a plain tensor, and a table whose last row is that of none."
    plain = Conditions(5, {}, 16)
    assert (plain.num_classes, plain.null_cond) == (5, -1)
    assert [*plain.state_dict()] == ["embedders.label.table.weight"]
    table = plain.embedders["label"].table.weight
    assert table.shape == (6, 16)
    found = plain(torch.tensor([0, 4, -1]))
    assert torch.equal(found.vector, table[[0, 4, 5]]) and found.tokens is None
    named = Conditions(0, {"label": LabelCondition(count=5)}, 16)
    assert named.null_cond == {"label": -1} and named.num_classes == 5


def test_padding_has_no_say(every):
    "Whatever stands for padding inside, all that is given out stays bit for bit the same."
    cond = some()
    before = every(cond)
    other = copy.deepcopy(every)
    with torch.no_grad():
        other.embedders["caption"].words.weight[0] = 100.
        other.embedders["caption"].places[3:] += 7  # where only the longer captions have words
    after, short = other(cond), [0, 3]              # captions of three words, and of none
    for a, b in zip(before[:3], after[:3]): assert torch.equal(a[short], b[short])
    assert not torch.equal(before.vector[1], after.vector[1])
    assert not before.tokens[~before.mask].any()


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_two_paddings_are_equal(kind):
    "The same caption in a longer row."
    torch.manual_seed(0)
    if kind == "text":
        few, many = (Conditions(0, {"c": TextCondition(words=20, length=n, width=8, heads=2)}, 16)
                     for n in (4, 9))
        state = few.state_dict()
        state["embedders.c.places"] = torch.cat([state["embedders.c.places"], torch.randn(5, 8)])
        cond = torch.tensor([[5, 6, 0, 0], [7, 8, 9, 3], [2, 0, 0, 0]])
        longer = torch.cat([cond, torch.zeros(3, 5).long()], 1)
    else:
        few, many = (Conditions(0, {"c": TokenCondition(length=n, size=3)}, 16) for n in (4, 9))
        state, cond = few.state_dict(), torch.randn(3, 4, 3)
        cond[0, 2:], cond[2] = 0, 0
        longer = torch.cat([cond, torch.zeros(3, 5, 3)], 1)
    many.load_state_dict(state)
    a, b = few({"c": cond}), many({"c": longer})
    assert torch.allclose(a.vector, b.vector, atol=1e-6)
    assert torch.allclose(a.tokens, b.tokens[:, :4], atol=1e-6)
    assert torch.equal(a.mask, b.mask[:, :4]) and not b.mask[:, 4:].any()


def test_other_rows_have_no_say(every):
    cond = some()
    whole, alone = every(cond), every({name: c[:1] for name, c in cond.items()})
    for a, b in zip(whole, alone): assert torch.allclose(a[:1].float(), b.float(), atol=1e-6)


def test_order_of_words_counts(every):
    cond = some()
    turned = cond | {"caption": cond["caption"][:, [1, 0, 2, 3, 4]]}
    assert not torch.allclose(every(cond).vector[0], every(turned).vector[0], atol=1e-4)


def test_nulls_are_finite_and_no_word_is_no_caption(every):
    null = {name: torch.as_tensor(v).expand(3, *torch.as_tensor(v).shape)
            for name, v in every.null_cond.items()}
    found = every(null)
    assert all(part.isfinite().all() for part in found)
    assert found.mask.sum(1).tolist() == [2, 2, 2]  # a token of the caption's, one of the others
    empty = every(null | {"caption": torch.zeros(3, 5).long()})
    for a, b in zip(found, empty): assert torch.equal(a, b)


def test_every_parameter_learns(every):
    "Each gets a gradient by the second step."
    sgd = torch.optim.SGD(every.parameters(), 0.1)
    weights = torch.randn(4, 9, 12)
    for _ in range(2):
        sgd.zero_grad()
        vector, tokens, _, _ = every(some())
        ((vector**2).sum() + (weights*tokens).sum()).backward()
        sgd.step()
    still = [name for name, p in every.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def test_autocast_and_half_precision(every):
    cond, exact = some(), every(some())
    with torch.autocast("cpu", torch.bfloat16): found = every(cond)
    for a, b in zip(exact[:2], found[:2]): assert (a - b.float()).abs().max() < 0.1
    found.vector.float().sum().backward()
    half = copy.deepcopy(every).bfloat16()
    assert all(part.isfinite().all() for part in half(cond))


class Told(nn.Module):
    "Uses all that there is."
    def __init__(self, conditions):
        super().__init__()
        self.conditions = conditions
        self.num_classes, self.null_cond = conditions.num_classes, conditions.null_cond

    def forward(self, x, time, cond):
        self.conditions.check(cond, len(x), tuple(x.shape[2:]))
        vector, tokens, mask, images = self.conditions(cond)
        total = vector.mean(1) + (tokens*mask[:, :, None]).sum((1, 2))
        return x + total[:, None, None, None] + images.mean(1, keepdim=True)


def test_dropped_and_guided(every):
    denoiser = Denoiser(Told(every), FlowSchedule(), "flow")
    cond, x, t = some(), torch.randn(4, 1, 8, 12), torch.tensor(0.5)
    one, three = denoiser(x, t, cond), guided(denoiser, 3.)(x, t, cond)
    none = denoiser(x, t, drop_cond(cond, torch.zeros(4), 0.5, every.null_cond))
    assert torch.allclose(three.x0, none.x0 + 3*(one.x0 - none.x0), atol=1e-4)
    assert torch.allclose(one.x0[3], none.x0[3], atol=1e-6)   # it was null from the first
    assert not torch.allclose(one.x0[0], none.x0[0], atol=1e-3)


def test_plain_labels_are_checked_as_before():
    class Labelled(Told):
        def forward(self, x, time, cond): return x
    denoiser = Denoiser(Labelled(Conditions(3, {}, 8)), FlowSchedule(), "flow")
    check_cond(denoiser, torch.tensor([0, -1]), 2)
    with pytest.raises(ValueError, match="0 to 2"): check_cond(denoiser, torch.tensor([3]), 1)


@pytest.mark.parametrize("change, says", [
    (None, "conditioned on label, place, caption, told, image: pass cond.*found NoneType"),
    ({"label": None}, r"cond\['label'\]: found None"), ({"more": torch.zeros(4)}, "found .*more"),
    ({"label": torch.zeros(4)}, "float32; allowed: shape .4,., integers"),
    ({"label": torch.zeros(4, 1).long()}, "allowed: shape .4,."),
    ({"label": torch.zeros(3).long()}, "one row for each of 4 samples"),
    ({"place": torch.zeros(4, 2).long()}, r"allowed: shape \(4, 2\), floating point"),
    ({"place": torch.zeros(4, 3)}, r"shape \(4, 3\), float32; allowed: shape \(4, 2\)"),
    ({"caption": torch.zeros(4, 6).long()}, r"cond\['caption'\].*allowed: shape \(4, 5\)"),
    ({"told": torch.zeros(4, 4, 5)}, r"allowed: shape \(4, 4, 6\)"),
    ({"image": torch.zeros(4, 3, 8, 12)}, r"allowed: shape \(4, 2, 8, 12\)"),
    ({"image": torch.zeros(4, 2, 4, 6)}, r"allowed: shape \(4, 2, 8, 12\)"),
    ({"label": torch.tensor([0, 3, 0, 0])}, r"cond\['label'\]: found 3; allowed: -1 to 2"),
    ({"label": torch.tensor([0, -2, 0, 0])}, "found -2; allowed: -1 to 2"),
    ({"caption": torch.full((4, 5), 20)}, "found 20; allowed: 0 to 19")])
def test_refusals(every, change, says):
    cond = some() if change is not None else None
    if cond: every.check(cond, 4, (8, 12), values=True)
    with pytest.raises(ValueError, match=says):
        every.check(cond and cond | change, 4, (8, 12), values=True)


def test_refusals_of_the_makes():
    labelled, nothing = Conditions(2, {}, 8), Conditions(0, {}, 8)
    for cond in (None, {"label": torch.zeros(1).long()}):
        with pytest.raises(ValueError, match="knows 2 classes .* pass cond"):
            labelled.check(cond, 1)
    with pytest.raises(ValueError, match="labels: found shape .2,., int64; allowed: shape .1,."):
        labelled.check(torch.zeros(2).long(), 1)
    nothing.check(None, 1)
    for call in (lambda: nothing.check(torch.zeros(1), 1), lambda: nothing(torch.zeros(1))):
        with pytest.raises(ValueError, match="unconditional"): call()
    images = Conditions(0, {"image": ImageCondition(channels=1)}, 8)
    images.check({"image": torch.zeros(2, 1, 5, 7)}, 2)  # any size, where none is given


def test_refusals_at_building():
    for name in ("type", "keys", "training", "forward"):
        with pytest.raises(ValueError, match=f"{name}.*torch keeps"):
            Conditions(0, {name: LabelCondition(count=2)}, 8)
    with pytest.raises(ValueError, match="num_classes: found 3 beside"):
        Conditions(3, {"era": LabelCondition(count=2)}, 8)
    with pytest.raises(ValueError, match="heads: found 4, which does not divide the width 6"):
        Conditions(0, {"caption": TextCondition(words=9)}, 8, 6)


def test_check_conditions():
    assert check_conditions(0, KINDS) == [] and check_conditions(4, {}) == []
    assert len(check_conditions(4, {"a.b": TextCondition(words=9, width=9)})) == 3
