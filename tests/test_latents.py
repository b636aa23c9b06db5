"Latents: what is kept, what is noticed, what a checkpoint carries, what is refused."
import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from diffusion_model import latents
from diffusion_model.autoencoder import Autoencoder
from diffusion_model.checkpoint import (
    find_checkpoint, load_checkpoint, save_checkpoint, wait_for_checkpoints)
from diffusion_model.config import ConfigError, load_config
from diffusion_model.dataset import ImageSet, create_dataset, create_loader, unaugmented
from diffusion_model.generation import generate, load_denoiser
from diffusion_model.latents import LatentSet, saved_autoencoder
from diffusion_model.space import create_space

sys.path.insert(0, str(Path(__file__).parent/"faults"))
from runs import At, autoencoder_config, latent_config, run_of, stop


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A folder with the runs of two little autoencoders, `one` and `other`."
    root = tmp_path_factory.mktemp("runs")
    for name, seed in (("one", 0), ("other", 1)):
        run_of(autoencoder_config(root/name, seed=seed)).fit()
    wait_for_checkpoints()
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_MODEL_CACHE", str(tmp_path/"cache"))
    return tmp_path/"cache"/"latents"


@pytest.fixture
def data(runs): return latent_config("unused", runs/"one").data


@pytest.fixture
def encodings(monkeypatch):
    "A list that grows with each time that a set is encoded."
    made, usual = [], latents.encode_all
    def counted(*given, **more):
        made.append(given)
        usual(*given, **more)
    monkeypatch.setattr(latents, "encode_all", counted)
    return made


def kept(data, **change):
    "The training set of a config, with its latents from the disk; the space."
    data = data.model_copy(update=change)
    space = create_space(data)
    return space.prepared(create_dataset(data).train), space


# -- what is encoded

def test_latents_have_a_scale_and_decode_to_bytes(data):
    space, images = create_space(data), create_dataset(data).train
    x = images.batch(torch.arange(64)).images
    z = space.encode(x)
    assert z.shape[1:] == space.shape == (4, 4, 4) and z.dtype == torch.float32
    assert abs(z.std() - 1) < 0.3 and abs(z.mean()) < 0.3  # twenty steps of training
    assert torch.equal(space.encode(z), z)
    network = space.autoencoder
    again = network.decode(network.encode(x).mean)
    assert torch.allclose(network.unscaled(z), network.encode(x).mean, atol=1e-5)
    assert (space.decode(z).int() - space.pixels.decode(again).int()).abs().max() <= 1


def test_the_precision_around_it_does_not_matter(data):
    space, x = create_space(data), create_dataset(data).train.batch(torch.arange(8)).images
    alone = space.encode(x)
    with torch.autocast("cpu", torch.bfloat16): assert torch.equal(space.encode(x), alone)


def test_the_disk_holds_what_would_be_encoded(data):
    "Flipped are those that would be flipped in pixels, and encoded as such."
    images = create_dataset(data).train
    found, space = kept(data)
    assert isinstance(found, LatentSet) and len(found) == len(images)
    indices, positions = torch.tensor([3, 5, 3, 88, 7, 7]), torch.tensor([0, 1, 2, 70, 71, 72])
    here, there = found.batch(indices, positions), images.batch(indices, positions)
    assert torch.allclose(here.images, space.encode(there.images), atol=4e-3)  # half precision
    assert torch.equal(here.cond, there.cond) and torch.equal(here.positions, there.positions)
    assert not torch.allclose(here.images[0], here.images[2], atol=0.05)  # one of them is flipped
    assert torch.equal(found[5][0], found.batch(torch.tensor([5])).images[0])
    assert found[5][1] == found[-85][1] == 5
    with pytest.raises(IndexError): found[90]


def test_samples_come_from_the_position(data):
    found, space = kept(data, latent_sample=True, horizontal_flip=False)
    n = 2000
    z = found.batch(torch.full((n,), 4), torch.arange(n)).images
    images = unaugmented(create_dataset(data).train, data)
    normal = space.posterior(images.batch(torch.tensor([4])).images)
    std = (0.5*normal.logvar[0]).exp()
    assert ((z.mean(0) - normal.mean[0]).abs() < 5*std/n**0.5 + 4e-3).all()
    assert (z.std(0)/std - 1).abs().max() < 5/(2*n)**0.5 + 4e-3
    assert torch.equal(found.batch(torch.tensor([4]), torch.tensor([17])).images[0], z[17])
    plain, _ = kept(data, horizontal_flip=False)
    assert plain.latents.nbytes*2 == found.latents.nbytes  # σ is kept where it is asked for


def test_workers_read_the_same(data):
    found, _ = kept(data, latent_sample=True)
    for few, many in zip(create_loader(found, 6, 0), create_loader(found, 6, 0, num_workers=2)):
        assert torch.equal(few.images, many.images) and torch.equal(few.cond, many.cond)
        if few.positions[0] >= 24: break
    assert isinstance(found.latents, np.memmap) and "latents" not in found.__getstate__()


@pytest.fixture
def folder(tmp_path):
    for name, level in (("a", 40), ("b", 200)):
        (tmp_path/"images"/name).mkdir(parents=True)
        for i in range(12):
            noise = np.random.default_rng(i).integers(0, 50, (8, 8, 3))
            image = Image.fromarray((level + noise).astype(np.uint8))
            image.save(tmp_path/f"images/{name}/{i}.png")
    return tmp_path/"images"


def test_bad_images_are_left_out(data, folder):
    bad = folder/"a"/"3.png"
    change = dict(dataset="folder", root=str(folder), bad_images="skip")
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.warns(UserWarning, match="left out"): found, _ = kept(data, **change)
    paths = found.images.source.load.paths
    i = [paths[j] for j in found.indices.tolist()].index(bad)
    assert len(found.batch(torch.arange(len(found)))[0]) == len(found) - 1
    some = found.batch(torch.tensor([i, i - 1]), torch.tensor([8, 9]))
    assert some.positions.tolist() == [9] and len(some.cond) == 1
    with pytest.raises(ValueError, match="cannot be read"): found[i]


def test_labels_are_those_of_now(data, folder, encodings):
    "Images are encoded once; what they are called may change."
    change = dict(dataset="folder", root=str(folder))
    first, _ = kept(data, **change)
    (folder/"a").rename(folder/"z")
    source = first.images.source
    paths = [folder/"z"/p.name if p.parent.name == "a" else p for p in source.load.paths]
    again = ImageSet(type(source)(type(source.load)(paths, folder, source.load.transform),
                                  len(paths), 1 - source.cond, ["b", "z"]),
                     first.images.transform, first.indices)
    second = create_space(data.model_copy(update=change)).prepared(again)
    assert len(encodings) == 1 and torch.equal(second.cond, 1 - first.cond)
    assert torch.equal(second[0][0], first[0][0])


# -- what is kept, and what is noticed

def test_a_second_run_finds_them(data, encodings):
    first, _ = kept(data)
    second, _ = kept(data)
    assert len(encodings) == 1 and second.folder == first.folder
    assert torch.equal(second[7][0], first[7][0])


CHANGES = {"data_seed": 1, "train_size": 89, "horizontal_flip": False, "latent_sample": True}


@pytest.mark.parametrize("field", [*CHANGES, "autoencoder", "format"])
def test_others_are_noticed(data, runs, encodings, monkeypatch, field):
    first, _ = kept(data)
    if field == "format": monkeypatch.setattr(latents, "FORMAT", 99)
    change = CHANGES | {"autoencoder": str(runs/"other")}
    second, _ = kept(data, **({} if field == "format" else {field: change[field]}))
    assert len(encodings) == 2 and second.folder != first.folder
    assert kept(data, **({} if field == "format" else {field: change[field]}))[0].folder \
        == second.folder and len(encodings) == 2


def test_another_normalisation_is_another_content(data):
    images = create_dataset(data).train
    space = create_space(data)
    there = space.about(images)
    space.data = data.model_copy(update={"mean": 0.4})
    assert space.about(images) != there


def flip_a_bit(folder):
    content = bytearray((folder/"latents.npy").read_bytes())
    content[-100] ^= 1
    (folder/"latents.npy").write_bytes(content)


DAMAGE = {
    "one bit": flip_a_bit,
    "cut short": lambda folder: (folder/"latents.npy").write_bytes(
        (folder/"latents.npy").read_bytes()[:-7]),
    "no latents": lambda folder: (folder/"latents.npy").unlink(),
    "no manifest": lambda folder: (folder/"manifest.json").unlink(),
    "a torn manifest": lambda folder: (folder/"manifest.json").write_text('{"about": {'),
    "of others": lambda folder: (folder/"manifest.json").write_text(json.dumps(
        json.loads((folder/"manifest.json").read_text()) | {"about": {}}))}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_noticed(data, encodings, kind):
    first, _ = kept(data)
    whole = (first.folder/"latents.npy").read_bytes()
    DAMAGE[kind](first.folder)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        second, _ = kept(data)
    assert len(encodings) == 2 and second.folder == first.folder
    assert (second.folder/"latents.npy").read_bytes() == whole
    assert kind in ("no manifest", "a torn manifest") or "damaged" in str(said[0].message)


def test_what_is_half_written_is_never_seen(data, cache, monkeypatch):
    class Full(OSError): pass
    def broken(images, space, file, *_):
        file.write_bytes(b"half")
        raise Full
    with monkeypatch.context() as within, pytest.raises(Full):
        within.setattr(latents, "encode_all", broken)
        kept(data)
    assert not [p for p in cache.iterdir() if p.suffix != ".lock"]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(data, cache):
    for name in ("dead", "alive"):
        (cache/f"{name}.part").mkdir(parents=True)
        (cache/f"{name}.part"/"latents.npy").write_bytes(b"half")
    with FileLock(cache/"alive.lock"): kept(data)
    assert [p.name for p in cache.glob("*.part")] == ["alive.part"]


def test_no_room_is_said_before_anything_is_written(data, cache, monkeypatch):
    monkeypatch.setattr(latents.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(OSError, match="latents need .* MB, and 0.0 MB are free"): kept(data)
    assert not [*cache.glob("*.part")]


def test_what_nobody_can_describe_is_encoded_batch_by_batch(data):
    class Mine(torch.utils.data.Dataset):
        classes = None
        def __len__(self): return 6
    mine = Mine()
    assert create_space(data).prepared(mine) is mine
    images = create_dataset(data).train
    class Silent:
        classes, cond = None, None
        def __len__(self): return 6
    silent = ImageSet(Silent(), images.transform)
    assert create_space(data).prepared(silent) is silent


# -- what a checkpoint carries

@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    "A run in the latents of `one`."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFUSION_MODEL_CACHE", str(tmp_path_factory.mktemp("cache")))
        run_of(latent_config(runs/"latent", runs/"one", max_steps=10)).fit()
    wait_for_checkpoints()
    return runs/"latent"


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_it_carries_the_autoencoder(runs, trained):
    carried = saved_autoencoder(load_checkpoint(trained))
    checkpoint = load_checkpoint(runs/"one")
    own = saved_autoencoder(checkpoint)
    assert isinstance(carried, Autoencoder) and same(carried, own) and not carried.training
    assert not any(p.requires_grad for p in carried.parameters())
    assert all(torch.equal(own.state_dict()[k], v) for k, v in checkpoint.ema.items())


def test_the_autoencoder_is_read_once(trained, monkeypatch):
    read = mock.Mock(wraps=saved_autoencoder)
    monkeypatch.setattr(latents, "saved_autoencoder", read)
    assert load_denoiser(trained).space.autoencoder is not None and read.call_count == 1


def test_samples_need_no_autoencoders_run(runs, trained, tmp_path):
    there = load_denoiser(trained)
    (runs/"one").rename(runs/"hidden")
    try:
        alone = load_denoiser(trained)
        first, second = (next(iter(generate(d, 4, torch.arange(4), space=d.space)))
                         for d in (there, alone))
        assert torch.equal(first.images, second.images) and first.images.dtype == torch.uint8
        assert first.images.shape == (4, 3, 8, 8)
    finally: (runs/"hidden").rename(runs/"one")


def test_it_goes_on_where_the_autoencoder_is_gone(runs, trained, tmp_path):
    whole = tmp_path/"whole"
    run_of(latent_config(whole, runs/"one", max_steps=10)).fit()
    part = tmp_path/"part"
    run_of(latent_config(part, runs/"one", max_steps=10), At(5, stop)).fit()
    wait_for_checkpoints()
    gone = latent_config(part, tmp_path/"gone", max_steps=10)
    with pytest.raises(ConfigError, match="gone.*no such folder.*--data.autoencoder ITS_FOLDER"):
        run_of(gone)
    again = run_of(latent_config(part, part, max_steps=10))
    again.resume(part)
    again.fit()
    wait_for_checkpoints()
    for name in ("model", "ema", "autoencoder"):
        files = [find_checkpoint(run)/f"{name}.safetensors" for run in (whole, part)]
        assert files[0].read_bytes() == files[1].read_bytes(), name


@pytest.mark.parametrize("choice, says", [("error", "autoencoder was"),
                                          ("accept", "another autoencoder than the one")])
def test_it_does_not_go_on_with_another(runs, trained, tmp_path, choice, says):
    other = run_of(latent_config(trained, runs/"other", if_changed=choice))
    with pytest.raises(ConfigError, match=says): other.resume(trained)


# -- what is refused

BAD = {
    "missing": ({"autoencoder": "nowhere"}, "found 'nowhere', which cannot be opened.*no such"),
    "channels": ({"channels": 1}, "data.channels: found 1; the autoencoder .* channels 3"),
    "mean": ({"mean": 0.4}, "data.mean: found 0.4; the autoencoder .* mean 0.5"),
    "std": ({"std": 0.3}, "data.std: found 0.3; the autoencoder .* std 0.5"),
    "size": ({"image_size": 9}, "data.image_size: found 9; the autoencoder shrinks images 2 times")}


@pytest.mark.parametrize("kind", BAD)
def test_an_autoencoder_that_does_not_fit(data, kind):
    change, says = BAD[kind]
    with pytest.raises(ConfigError, match=says) as error:
        create_space(data.model_copy(update=change)).shape
    assert len(error.value.lines) == 1


def test_a_run_that_holds_no_autoencoder(tmp_path, data):
    cfg = load_config("quickstart")
    save_checkpoint(tmp_path, 1, torch.nn.Linear(2, 2), None, None, cfg)
    wait_for_checkpoints()
    with pytest.raises(ValueError, match="holds no autoencoder; name a run of one"):
        create_space(data.model_copy(update={"autoencoder": str(tmp_path)})).shape


def scaled(run, to, factor):
    "The same autoencoder with another variance: as one that was never trained, or on others."
    checkpoint = load_checkpoint(run)
    state = dict(checkpoint.ema)
    state["latent_var"] = state["latent_var"]*factor
    save_checkpoint(to, 1, state, None, None, checkpoint.config)
    wait_for_checkpoints()
    return to


@pytest.mark.parametrize("factor, std", [(16., "0.2"), (1/16, "[34]"), (1., None)])
def test_an_autoencoder_that_is_not_trained(data, runs, tmp_path, encodings, factor, std):
    found = data.model_copy(update={"autoencoder": str(scaled(runs/"one", tmp_path/"x", factor))})
    space, images = create_space(found), create_dataset(found).train
    if std is None: assert len(space.prepared(images)) == 90
    else:
        with pytest.raises(ConfigError, match=f"standard deviation of {std}.*not trained"):
            space.prepared(images)
        assert not encodings


def test_latents_that_are_not_finite(data):
    space = create_space(data)
    with torch.no_grad(): space.autoencoder.latent_mean.fill_(1e6)
    x = create_dataset(data).train.batch(torch.arange(2)).images
    with pytest.raises(ValueError, match="not finite"): latents._rows(space, x, False, False)


def test_latents_as_large_as_images(tmp_path, data):
    cfg = autoencoder_config(tmp_path/"flat", patch_size=1, latent_channels=3)
    run_of(cfg, At(5, stop)).fit()
    wait_for_checkpoints()
    with pytest.raises(ConfigError, match="as large as the images"):
        create_space(data.model_copy(update={"autoencoder": str(tmp_path/"flat")})).shape


CLASHES = {
    "no autoencoder": ({"autoencoder": "null"}, "data.autoencoder: needed for space 'latents'"),
    "clip_x0": ({"clip_x0": "true"}, "sampling.clip_x0: found True with space 'latents'"),
    "threshold": ({"dynamic_threshold": "0.9"}, "sampling.dynamic_threshold: found 0.9"),
    "crop": ({"crop": "random"}, "data.crop: found 'random' .*choose center or none"),
    "condition": ({"image_condition": "sketch"}, "data.image_condition: found 'sketch'"),
    "objective": ({"objective": "autoencoder"}, "objective: found 'autoencoder' with model.name"),
    "space": ({"space": "pixels"}, "data.autoencoder: found '.*' with space 'pixels'")}


@pytest.mark.parametrize("kind", CLASHES)
def test_a_config_that_cannot_be(kind):
    change, says = CLASHES[kind]
    change = {"autoencoder": "runs/one"} | change
    with pytest.raises(ConfigError, match=says): latent_config("out", **change)


def test_an_autoencoder_learns_from_pixels_and_by_its_own_objective(tmp_path):
    with pytest.raises(ConfigError, match="data.space: found 'latents' with objective"):
        autoencoder_config(tmp_path, space="latents", autoencoder="x", clip_x0="false")
    with pytest.raises(ConfigError, match="model.name 'autoencoder': choose 'autoencoder'"):
        autoencoder_config(tmp_path, objective="diffusion")


def test_a_network_that_does_not_fit_the_latents(runs, tmp_path):
    with pytest.raises(ConfigError, match=r"space latents of \(4, 4, 4\): .*channel_multipliers"):
        run_of(latent_config(tmp_path, runs/"one", channel_multipliers="[1, 1, 1, 1]"))
