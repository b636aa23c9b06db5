"Avatars: what is drawn is what is said, nothing held out is drawn, and the cache never lies."
import multiprocessing
import pickle
import sys
import warnings
from collections import Counter
from types import SimpleNamespace

import dicebear
import pytest
import torch

from diffusion_model import avatars
from diffusion_model.avatars import (
    PAINTS, STYLES, Avatars, Look, captions_of, draw_avatars, draw_look, looks, open_avatars)
from diffusion_model.captions import split_words
from diffusion_model.config import DataConfig, load_config
from diffusion_model.dataset import (
    compare_data, content_of, create_dataset, create_loader, describe_data)
from diffusion_model.networks import create_network

EVERY = looks() + looks(unseen=True)
FIRST = "a cactus in a green pot at night"
UNSEEN = [Look("person", "purple", "a person with {} bunny ears", False),
          Look("landscape", "orange", "{} plains under a moon", False),
          Look("face", "grey", "a sad {} face", False)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_MODEL_CACHE", str(tmp_path/"cache"))
    return tmp_path/"cache"/"avatars"


@pytest.fixture
def drawn(monkeypatch):
    "The numbers of images that were drawn."
    counted, usual = [], avatars.draw_avatars
    def counting(seed, indices, *more):
        counted.append(len(indices))
        return usual(seed, indices, *more)
    monkeypatch.setattr(avatars, "draw_avatars", counting)
    return counted


def config(**fields):
    sizes = {"train_size": 20, "validation_size": 4, "test_size": 6}
    return DataConfig(dataset="avatars", horizontal_flip=False, **sizes | fields)


# -- looks

def test_what_is_held_out_is_an_eighth_of_every_style_feature_and_colour():
    unseen = looks(unseen=True)
    assert len(set(EVERY)) == len(EVERY) == 384 and not set(looks()) & set(unseen)
    for name in ("style", "feature", "night"):
        held, all_ = (Counter(getattr(k, name) for k in some) for some in (unseen, EVERY))
        assert all(8*held[value] == n for value, n in all_.items()), name
    assert set(Counter(k.colour for k in unseen)) == set(PAINTS)
    for look in unseen:  # each pair of its three is learned from
        for a, b in (("style", "colour"), ("feature", "night"), ("colour", "night")):
            pair = getattr(look, a), getattr(look, b)
            assert any((getattr(k, a), getattr(k, b)) == pair for k in looks())


def test_the_looks_are_these():
    "A model is asked for what it has never seen: so this must not change behind its back."
    assert looks(unseen=True)[:3] == UNSEEN and looks()[0].caption() == FIRST


def test_every_caption_is_another_and_says_the_colour():
    texts = [k.caption() for k in EVERY]
    assert len(set(texts)) == len(texts)
    for look in EVERY:
        for short in (False, True):
            words = look.caption(short).split()
            assert set(words) & set(PAINTS) == {look.colour}
            assert (words[-2:] == ["at", "night"]) == look.night
            assert ("a", "orange") not in zip(words, words[1:])
        assert look.caption(True) == look._replace(
            feature=next(iter(STYLES[look.style].features))).caption(True)


def test_every_style_is_in_the_public_domain(monkeypatch):
    for style in STYLES.values():
        licence = avatars._definition(style.definition).meta().license()
        assert licence.name() == "CC0 1.0" and "publicdomain/zero" in licence.url()
    avatars._definition.cache_clear()
    with pytest.raises(ValueError, match="'micah' is under CC BY 4.0, and only CC0 1.0 is used"):
        avatars._definition("micah")


# -- pictures

def reported(look, seed):
    style = avatars._definition(STYLES[look.style].definition)
    made = dicebear.Avatar(style, {"seed": seed} | look.options())
    return made.to_json()["options"]


@pytest.mark.parametrize("style", STYLES)
def test_options_are_what_the_drawing_has_and_the_seed_decides_the_rest(style):
    "DiceBear reports what it drew: each option that we name holds, of a list one of its values."
    for look in (k for k in EVERY if k.style == style):
        report = reported(look, "3")
        for name, value in look.options().items():
            if name.endswith("Probability"):
                shown = name.replace("Probability", "Variant") in report
                assert value in (0, 100) and shown == (value == 100) or value == 60, name
            else:
                found = report.get(name)
                if found is None: continue  # a part that this feature does not have
                found = found[0] if isinstance(found, list) else found
                assert found in (value if isinstance(value, list) else [value]), name
    different = {str(reported(look, f"0/{i}")) for i in range(20)}
    assert len(different) > 3


def test_what_the_seed_decides_is_spread_evenly():
    look = Look("monster", "red", "a {} monster with horns", False)
    bodies = Counter(reported(look, f"0/{i}")["bodyVariant"] for i in range(400))
    assert len(bodies) == 4 and all(60 < n < 140 for n in bodies.values()), bodies


@pytest.mark.parametrize("size", [8, 32, 64])
def test_pictures_are_functions_of_seed_and_index(size):
    images = draw_avatars(5, torch.arange(12), size)
    assert images.shape == (12, 3, size, size) and images.dtype == torch.uint8
    assert torch.equal(draw_avatars(5, torch.tensor([11, 2]), size), images[[11, 2]])
    again = draw_avatars(6, torch.arange(12), size)
    assert sum(torch.equal(a, b) for a, b in zip(images, again)) <= 2
    assert torch.equal(draw_look(looks()[2], "5/2", size), images[2])


@pytest.mark.parametrize("size", [32, 64])
def test_features_and_colours_are_visible(size):
    "Of the same seed, another feature, colour or ground changes the picture, at both sizes."
    for style, about in STYLES.items():
        first, *others = about.features
        look = Look(style, "green", first, False)
        base = draw_look(look, "1", size).float()
        changed = [look._replace(feature=f) for f in others] + [
            look._replace(colour=c) for c in PAINTS if c != "green"]
        if about.nights: changed.append(look._replace(night=True))
        for other in changed:
            gap = (draw_look(other, "1", size).float() - base).abs().amax(0)
            assert (gap > 40).double().mean() > 0.004, f"{look.caption()}; {other.caption()}"


def test_the_main_colour_is_the_nearest_to_what_is_seen():
    "Of every look, the pixels that are nearest to a paint are nearest to its own, most of them."
    paints = torch.tensor([list(bytes.fromhex(c[1:])) for c in PAINTS.values()]).float()
    for look in EVERY[::5]:
        pixels = draw_look(look, "0", 64).flatten(1).T.float()
        gaps = torch.cdist(pixels, paints)
        near = gaps.argmin(1)[gaps.amin(1) < 25]
        if look.style == "plant" and look.colour != "green":
            near = near[near != list(PAINTS).index("green")]
        assert near.bincount(minlength=8).argmax() == list(PAINTS).index(look.colour), look


# -- the data set

def test_training_never_draws_what_is_held_out():
    unseen = set(looks(unseen=True))
    for split in ("train", "validation", "test"):
        source = Avatars(3000, split=split)
        assert not set(source.looks) & unseen
        assert set(source.looks) == set(looks())
        for look, text in zip(source.looks, source.captions):
            assert text in (look.caption(), look.caption(short=True))


def test_the_splits_are_other_pictures():
    parts = [Avatars(30, split=split).array() for split in ("train", "validation", "test")]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        same = (parts[a][:, None] == parts[b][None]).flatten(2).all(2)
        assert same.sum() <= 2


def test_labels_captions_and_words(drawn):
    sets = create_dataset(config(train_size=400))
    assert not drawn, "opening a data set draws nothing"
    source = sets.train.source
    assert sets.classes == list(STYLES)
    assert source.cond["label"].tolist() == [sets.classes.index(k.style) for k in source.looks]
    for row, text in zip(source.cond["caption"].tolist(), source.captions):
        assert sets.vocabulary.decode(row).split() == split_words(text)
    short = sum(t == k.caption(True) for k, t in zip(source.looks, source.captions))
    assert 25 < short < 80
    for look in looks(unseen=True): assert not sets.vocabulary.unknown(look.caption())
    assert open_avatars(config(train_size=3))[1] == sets.vocabulary
    assert captions_of(0, torch.tensor([7]))[1][0] == source.captions[7]


def test_batches_are_the_pictures():
    sets = create_dataset(config())
    batch = create_loader(sets.train, 8, seed=0).at(1)
    at = create_loader(sets.train, 8, seed=0).address(1)[0]
    pictures = ((batch.images + 1)*127.5).round().to(torch.uint8)
    assert torch.equal(pictures, draw_avatars(0, at))
    assert torch.equal(batch.cond["label"], sets.train.source.cond["label"][at])
    grey = create_dataset(config(channels=1)).train.batch(torch.arange(3)).images
    assert grey.shape == (3, 1, 32, 32)


def test_workers_find_the_pictures_on_the_disk(drawn):
    source = Avatars(6)
    source.array()
    sent = pickle.dumps(source)
    assert len(sent) < 6*3*32*32
    assert torch.equal(pickle.loads(sent).array(), source.array()) and drawn == [6]


def test_drawn_once_and_a_larger_set_has_the_smaller_one_in_it(drawn, monkeypatch):
    monkeypatch.setattr(avatars, "BLOCK", 4)
    small = Avatars(8).array()
    assert drawn == [4, 4]
    large = Avatars(10).array()
    assert drawn == [4, 4, 2] and torch.equal(large[:8], small)
    assert torch.equal(large, draw_avatars(0, torch.arange(10)))


@pytest.mark.parametrize("change", [
    {"seed": 1}, {"image_size": 16}, {"split": "test"}, "styles", "library"])
def test_other_pictures_are_not_mistaken_for_these(drawn, monkeypatch, change):
    Avatars(3).array()
    if change == "styles":
        monkeypatch.setitem(avatars.PAINTS, "green", "#008000")
        change = {}
    if change == "library":
        monkeypatch.setattr(avatars, "metadata", SimpleNamespace(version=lambda name: "99"))
        change = {}
    again = Avatars(3, **change)
    assert torch.equal(again.array(), avatars.draw_avatars(
        again.seed, again.first + torch.arange(3), again.image_size))
    assert drawn == [3, 3, 3]


def test_damage_is_noticed(cache, drawn):
    whole = Avatars(5).array()
    file, = cache.glob("*/images.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.equal(Avatars(5).array(), whole)
    assert drawn == [5, 5] and "damaged" in str(said[0].message)


def test_what_was_stopped_leaves_nothing_half_and_goes_on(cache, monkeypatch):
    monkeypatch.setattr(avatars, "BLOCK", 4)
    with monkeypatch.context() as within, pytest.raises(KeyboardInterrupt):
        usual = avatars.draw_look
        def stopped(look, seed, size):
            if seed == "0/6": raise KeyboardInterrupt
            return usual(look, seed, size)
        within.setattr(avatars, "draw_look", stopped)
        Avatars(8).array()
    assert not [*cache.glob("*.part")] and len([*cache.glob("*/images.npy")]) == 1
    counted = []
    monkeypatch.setattr(avatars, "draw_look", lambda *a: counted.append(a[1]) or usual(*a))
    Avatars(8).array()
    assert counted == ["0/4", "0/5", "0/6", "0/7"]


def _drawn_in(place):
    import os
    os.environ["DIFFUSION_MODEL_CACHE"] = place
    source, counted, usual = Avatars(40), [], avatars.draw_look
    avatars.draw_look = lambda *a: counted.append(1) or usual(*a)
    return source.array().sum().item(), len(counted)


def test_several_processes_draw_once(cache):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(_drawn_in, [str(cache.parent)]*2, chunksize=1)
    assert found[0][0] == found[1][0] and sum(n for _, n in found) == 40


def test_a_run_knows_what_it_was_trained_on(drawn):
    then = describe_data(create_dataset(config()))
    assert not drawn and then["vocabulary"] and "dicebear-styles" in then["train"]["libraries"]
    assert compare_data(then, describe_data(create_dataset(config()))) == []
    other = compare_data(then, describe_data(create_dataset(config(data_seed=3))))
    assert "train: 20 images then, 20 now: seed was 0, is 3" in other
    sets = create_dataset(config())
    assert len({content_of(images, config()) for images in sets[:3]}) == 3


def test_without_the_extra_an_error_says_what_to_install(monkeypatch):
    for name in ("dicebear", "resvg_py"):
        avatars._definition.cache_clear()
        with monkeypatch.context() as within:
            within.setitem(sys.modules, name, None)
            with pytest.raises(ValueError, match=r"pip install 'diffusion_model\[avatars\]'"):
                create_dataset(config())
    avatars._definition.cache_clear()
    monkeypatch.setattr(avatars.resources, "files", lambda name: exec("raise ImportError"))
    with pytest.raises(ValueError, match="dicebear-styles"): create_dataset(config())


def test_the_module_loads_without_the_extra():
    code = ("import sys; sys.modules |= dict.fromkeys(('dicebear', 'dicebear_styles', 'resvg_py'));"
            "from diffusion_model.avatars import looks; print(looks()[0].caption())")
    import subprocess
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == FIRST, done.stderr


def test_what_is_refused():
    with pytest.raises(ValueError, match="avatars are square: choose 32"):
        create_dataset(config(image_size=[32, 64]))
    with pytest.raises(ValueError, match="split: found 'val'; allowed"): Avatars(3, split="val")
    assert create_dataset(config(image_size=[16, 16])).train.batch([1]).images.shape[-1] == 16


def test_the_config_is_small_and_reads_every_caption():
    cfg = load_config("avatars")
    network = create_network(cfg.model, cfg.data.shape)
    assert sum(p.numel() for p in network.parameters()) <= 4.0e6
    caption, words = cfg.model.conditions["caption"], open_avatars(config())[1]
    assert caption.length == cfg.data.caption_length and caption.words >= len(words)
    assert max(len(split_words(k.caption())) for k in EVERY) <= caption.length
