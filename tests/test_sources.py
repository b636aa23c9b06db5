"Arrays, Hugging Face's data sets, captions and conditions that are images; whoever reads them."
import json, pickle, time, warnings
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_model import sources
from diffusion_model.captions import Vocabulary
from diffusion_model.config import DataConfig
from diffusion_model.counters import counter_uniform
from diffusion_model.dataset import (ArraySource, LazySource, compare_data,
                                     create_dataset, create_loader, cut_parts, describe_data,
                                     draw_shapes, labels_of, split_train)
from diffusion_model.sources import (
    IMAGE_CONDITIONS, ArrayImages, ImageConditionMaker, channels_last, create_image_condition,
    found_in, open_arrays)

try: import datasets
except ImportError: datasets = None
hub = pytest.mark.skipif(datasets is None, reason="the library datasets is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "The library's cache lies in a folder of the test."
    if datasets is None: return
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path/"cache")
    datasets.disable_progress_bars()


def config(**kw):
    return DataConfig(**{"image_size": 8, "horizontal_flip": False, "validation_fraction": 0.1,
                         "dataset": "arrays", **kw})


def as_bytes(x): return ((x + 1)*127.5).round().to(torch.uint8)


def whole(part): return part.batch(torch.arange(len(part)))


def random(n=20, channels=4, h=8, w=8, dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f": return rng.random((n, channels, h, w)).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max + 1, (n, channels, h, w)).astype(dtype)


# -- arrays

@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "float64", ">u2",
                                   ">f4"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("last", [False, True])
def test_an_array_comes_out_as_it_went_in(tmp_path, dtype, channels, last):
    x = random(channels=channels, h=8, w=16, dtype=np.dtype(dtype))
    np.save(tmp_path/"x.npy", x.transpose(0, 2, 3, 1) if last else x)
    sets = create_dataset(config(root=str(tmp_path/"x.npy"), channels=channels, image_size=[8, 16]))
    assert [len(s) for s in sets[:3]] == [16, 2, 2]
    assert sets.classes is None and sets.vocabulary is None
    top = np.iinfo(x.dtype).max if x.dtype.kind == "u" else 1
    for part in sets[:3]:
        batch = whole(part)
        assert batch.cond is None and batch.images.dtype == torch.float32
        expected = torch.from_numpy(x[part.indices.numpy()].astype(np.float64)/top)
        assert (batch.images.double() - (expected*2 - 1)).abs().max() < 1e-6
    seen = torch.cat([part.indices for part in sets[:3]]).sort().values
    assert torch.equal(seen, torch.arange(20))


def test_grey_without_an_axis_for_it(tmp_path):
    x = random(channels=1)[:, 0]
    np.save(tmp_path/"x.npy", x)
    for channels in (1, 3):
        sets = create_dataset(config(root=str(tmp_path/"x.npy"), channels=channels))
        seen = as_bytes(whole(sets.test).images)[:, -1]
        assert torch.equal(seen, torch.from_numpy(x)[sets.test.indices])
    with pytest.raises(ValueError, match="data.channels"):
        whole(create_dataset(config(root=str(tmp_path/"x.npy"), channels=4)).test)


@pytest.mark.parametrize("shape, channels, last", [
    ((5, 4, 8, 8), 4, False), ((5, 8, 8, 4), 4, True), ((5, 3, 8, 8), 1, False),
    ((5, 8, 8, 1), 3, True), ((5, 4, 8, 4), 4, False), ((5, 8, 8), 1, False)])
def test_which_axis_is_the_channels(shape, channels, last):
    assert channels_last(shape, channels, "x") == last


@pytest.mark.parametrize("shape, channels", [((5, 4, 8, 8), 3), ((5, 3, 8, 8), 4), ((5, 8), 1),
                                             ((5, 1, 2, 3, 4), 1)])
def test_no_axis_can_be_the_channels(shape, channels):
    with pytest.raises(ValueError, match="x.npy: found an array of shape .*data.channels"):
        channels_last(shape, channels, "x.npy")


def test_a_mapped_file_is_neither_read_whole_nor_sent_whole(tmp_path):
    np.save(tmp_path/"x.npy", random(300, 3, 64, 64))
    images = ArrayImages(open_arrays(tmp_path/"x.npy")["images"], 3, "x")
    assert isinstance(images.array, np.memmap) and len(pickle.dumps(images)) < 5000
    again = pickle.loads(pickle.dumps(images))
    some = torch.tensor([299, 0, 7])
    assert torch.equal(images[some], again[some]) and len(again) == 300
    loose = pickle.loads(pickle.dumps(ArrayImages(random(), 4)))
    assert torch.equal(loose[some % 20], ArrayImages(random(), 4)[some % 20])


@pytest.mark.parametrize("value", [-1e-3, 1.001, np.nan, np.inf, -np.inf])
def test_floats_out_of_range_name_file_and_image(tmp_path, value):
    x = random(dtype=np.float32)
    x[13, 2, 3, 4] = value
    np.save(tmp_path/"x.npy", x)
    with pytest.raises(ValueError, match=r"x.npy: image 13 holds .*0 to 1 \(black to white\)"):
        create_dataset(config(root=str(tmp_path/"x.npy"), channels=4))


def test_a_large_array_is_looked_at_batch_by_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "WHOLE", 100)
    x = random(dtype=np.float32)
    x[13] = 2
    np.save(tmp_path/"x.npy", x)
    sets = create_dataset(config(root=str(tmp_path/"x.npy"), channels=4))
    with pytest.raises(ValueError, match="image 13 holds 2"):
        for part in sets[:3]: whole(part)


def test_a_large_array_is_known_by_some_of_its_rows(monkeypatch):
    x = random(50)
    monkeypatch.setattr(sources, "WHOLE", 100)
    known = lambda a: ArraySource(ArrayImages(a, 4)).describe(torch.arange(len(a)))
    assert known(x) == known(x.copy())
    y = x.copy()
    y[0] += 1
    assert known(x) != known(y) and known(x) != known(x[:49])


@pytest.mark.parametrize("make, says", [
    (lambda p: None, "no file or folder '.*x.npy'"),
    (lambda p: p.write_bytes(b"rubbish"), "x.npy: not a readable array .7 bytes."),
    (lambda p: p.write_bytes(b""), "x.npy: not a readable array"),
    (lambda p: np.save(p, np.zeros((9, 4, 4), np.int64)), "numbers of type int64; allowed: uint8"),
    (lambda p: np.save(p, np.array([{}], dtype=object), allow_pickle=True), "not a readable array"),
    (lambda p: np.save(p, np.zeros((2, 8, 8, 3), np.uint8)), "found 2 images"),
    (lambda p: np.save(p, np.zeros((9, 8, 8, 5), np.uint8)), "found an array of shape")])
def test_arrays_that_are_none(tmp_path, make, says):
    make(tmp_path/"x.npy")
    with pytest.raises((ValueError, FileNotFoundError), match=says) as error:
        create_dataset(config(root=str(tmp_path/"x.npy")))
    assert "\n" not in str(error.value)


def test_a_folder_of_arrays_and_a_packed_file_are_the_same(tmp_path):
    arrays = dict(images=random(channels=3), labels=np.arange(20) % 3,
                  captions=np.array([f"number {i}" for i in range(20)]))
    np.savez(tmp_path/"x.npz", **arrays)
    (tmp_path/"x").mkdir()
    for name, x in arrays.items(): np.save(tmp_path/"x"/f"{name}.npy", x)
    one, two = (create_dataset(config(root=str(tmp_path/name))) for name in ("x.npz", "x"))
    for a, b in zip(one[:3], two[:3]):
        a, b = whole(a), whole(b)
        assert torch.equal(a.images, b.images)
        assert a.cond.keys() == b.cond.keys() == {"label", "caption"}
        for key in a.cond: assert torch.equal(a.cond[key], b.cond[key])
    assert compare_data(describe_data(one), describe_data(two)) == []
    np.savez(tmp_path/"alone.npz", whatever=arrays["images"])
    assert len(create_dataset(config(root=str(tmp_path/"alone.npz"))).train) == 16
    np.savez(tmp_path/"none.npz", a=np.zeros(3), b=np.zeros(3))
    with pytest.raises(ValueError, match="holds a, b, and no images"):
        create_dataset(config(root=str(tmp_path/"none.npz")))


def test_what_stands_beside_the_images(tmp_path):
    n = 20
    np.savez(tmp_path/"x.npz", images=random(n, 3), labels=np.arange(n, dtype=np.int32) % 2,
             classes=["no", "yes"], colour=np.arange(n) % 5, heat=np.arange(n)/7,
             place=np.ones((n, 3)), tokens=np.ones((n, 6, 4), np.float16))
    sets = create_dataset(config(root=str(tmp_path/"x.npz")))
    cond = whole(sets.train).cond
    facts = {k: (v.dtype, tuple(v.shape)) for k, v in cond.items()}
    assert facts == {"label": (torch.int64, (16,)), "colour": (torch.int64, (16,)),
                     "heat": (torch.float32, (16, 1)), "place": (torch.float32, (16, 3)),
                     "tokens": (torch.float32, (16, 6, 4))}
    assert sets.classes == ["no", "yes"] and torch.equal(labels_of(cond), sets.train.indices % 2)
    np.savez(tmp_path/"y.npz", images=random(n, 3), labels=np.arange(n) % 4)
    plain = create_dataset(config(root=str(tmp_path/"y.npz")))
    assert torch.equal(whole(plain.train).cond, plain.train.indices % 4)  # a plain one, as always
    assert plain.classes == ["0", "1", "2", "3"]


@pytest.mark.parametrize("name, x, says", [
    ("labels", np.zeros(19, int), "labels has 19 rows, and there are 20 images"),
    ("heat", np.float32(3), "heat has no rows"), ("labels", np.zeros(20), "whole numbers"),
    ("labels", np.zeros((20, 2), int), "labels have shape"),
    ("labels", np.full(20, -2), "labels are -2 to -2"), ("captions", np.zeros(20), "array of text"),
    ("name", np.array(["x"]*20), "a condition is made of numbers")])
def test_conditions_that_do_not_fit(name, x, says):
    with pytest.raises(ValueError, match=says):
        found_in({"images": random(20, 3), name: x}, "x.npz")


def test_parts_of_an_array_never_meet_and_are_all():
    for n, fraction in ((3, 0.4), (20, 0.05), (101, 0.3)):
        parts = cut_parts(n, fraction, 0, ("validation", "test"))
        assert torch.equal(torch.cat([*parts.values()]).sort().values, torch.arange(n))
        assert len(parts["test"]) == len(parts["validation"]) >= 1
    train, validation = split_train(100, 0.1, 3)
    again = cut_parts(100, 0.1, 3, ("validation",))
    assert torch.equal(again["train"], train) and torch.equal(again["validation"], validation)
    assert torch.equal(cut_parts(5, 0.1, 0, ())["train"], torch.arange(5))
    with pytest.raises(ValueError, match="found 2 images; training and validation and test"):
        cut_parts(2, 0.1, 0, ("validation", "test"))


def test_an_array_is_prepared_once_where_that_changes_it(tmp_path):
    np.save(tmp_path/"x.npy", random(200, 3, 20, 30))
    for crop in ("center", "random", "none"):
        data = config(root=str(tmp_path/"x.npy"), crop=crop, horizontal_flip=True,
                      image_size=[8, 16])
        sets = create_dataset(data)
        loader = create_loader(sets.train, 16, seed=0)
        before = [sets.train.batch(*loader.address(k)) for k in range(4)]
        assert sets.train.prepared[1] is None
        after = [loader.at(k) for k in range(4)]
        assert sets.train.prepared[1] is not None
        for a, b in zip(before, after): assert torch.equal(a.images, b.images)
        other = create_dataset(config(root=str(tmp_path/"x.npy"), image_size=[4, 8])).train
        sets.train.transform = other.transform  # then that one counts, at once
        at = loader.address(0)
        assert torch.equal(sets.train.batch(*at).images, other.batch(*at).images)
        assert torch.equal(loader.at(0).images, other.batch(*at).images)
        sets.train.prepared = None, None
        sets.train.ready(most=100)
        assert sets.train.prepared[1] is None  # too large
    same = create_dataset(config(root=str(tmp_path/"x.npy"), image_size=[20, 30])).train
    same.ready()
    assert same.prepared[1] is None


# -- captions

@pytest.fixture
def folder(tmp_path):
    "Twenty pictures in two classes; the caption of each says its number."
    root = tmp_path/"pictures"
    lines = []
    for i in range(20):
        path = root/("cats" if i % 2 else "dogs")/f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (12*i,)*3).save(path)
        lines.append({"file": path.relative_to(root).as_posix(), "caption": f"Picture {i}"})
    (root/"captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def captioned(root, **kw):
    return create_dataset(config(dataset="folder", root=str(root), caption_length=4, **kw))


def test_captions_of_a_folder_stay_with_their_images(folder):
    sets = captioned(folder)
    for part in sets[:3]:
        batch = whole(part)
        numbers = (as_bytes(batch.images)[:, 0, 0, 0]//12).tolist()
        assert labels_of(batch.cond).tolist() == [n % 2 == 0 for n in numbers]
        known = [sets.vocabulary.decode(row) for row in batch.cond["caption"]]
        assert batch.cond["caption"].shape == (len(part), 4)
        assert batch.cond["caption"].dtype == torch.int64
        if part is sets.train: assert known == [f"picture {n}" for n in numbers]
        else: assert known == ["picture ?"]*len(numbers)  # what only they say is never learned
    assert len(sets.vocabulary) == 3 + 1 + len(sets.train)


def test_a_folder_without_captions_is_as_it_was(folder):
    (folder/"captions.jsonl").unlink()
    sets = captioned(folder)
    assert sets.vocabulary is None and whole(sets.train).cond.ndim == 1
    assert "vocabulary" not in describe_data(sets)


def test_captions_without_classes(folder):
    for path in folder.glob("*/*.png"): path.rename(folder/path.name)
    for name in ("cats", "dogs"): (folder/name).rmdir()
    (folder/"captions.jsonl").unlink()
    for path in folder.glob("*.png"): path.with_suffix(".txt").write_text(f"Picture {path.stem}")
    sets = captioned(folder)
    assert sets.classes is None and set(whole(sets.train).cond) == {"caption"}
    assert labels_of(whole(sets.train).cond) is None


def test_the_vocabulary_is_as_large_as_asked(folder):
    sets = captioned(folder, caption_words=6)
    assert len(sets.vocabulary) == 6 and sets.vocabulary.words[0] == "picture"
    assert set(whole(sets.train).cond["caption"].unique().tolist()) == {0, 1, 3, 4, 5}


def test_captions_that_changed_are_noticed(folder):
    friday = describe_data(captioned(folder))
    json.dumps(friday)
    text = (folder/"captions.jsonl").read_text()
    first = sorted(captioned(folder).train.source.load.paths[i].name
                   for i in captioned(folder).train.indices.tolist())[0]
    text = text.replace(f"Picture {int(first[:2])}\"", 'Picture moon"')
    (folder/"captions.jsonl").write_text(text)
    lines = compare_data(friday, describe_data(captioned(folder)))
    assert any("vocabulary: 17 words then, 17 now: 1 gone" in x and "1 new (moon)" in x
               for x in lines)
    assert any("train: 16 images then, 16 now: other labels or conditions" in x for x in lines)
    (folder/"captions.jsonl").unlink()
    assert "captions: there are none now" in compare_data(friday, describe_data(captioned(folder)))


def test_a_missing_caption_is_the_null_and_said_once(folder):
    lines = (folder/"captions.jsonl").read_text().split("\n")
    (folder/"captions.jsonl").write_text("\n".join(lines[1:]))
    with pytest.warns(UserWarning) as told: sets = captioned(folder)
    assert sum("1 of 20 images have none" in str(w.message) for w in told) == 1
    rows = torch.cat([whole(part).cond["caption"] for part in sets[:3]])
    assert (rows[:, 0] == 2).sum() == 1


@pytest.mark.parametrize("text, says", [
    ('{"file": "cats/99.png", "caption": "x"}', "'cats/99.png'"), ("{", "line 1 is not JSON")])
def test_wrong_captions_stop_a_run_with_one_line(folder, tmp_path, text, says):
    (folder/"captions.jsonl").write_text(text)
    with pytest.raises(ValueError, match=says): captioned(folder)


# -- Hugging Face's data sets

def rows(n=30, first=0, size=8):
    x, y = draw_shapes(0, torch.arange(first, first + n), size)
    return x, y, {"picture": [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in x],
                  "kind": y.tolist(), "text": [f"figure {i}" for i in y.tolist()]}


def table(n=30, first=0, names=tuple("abcdefgh")):
    kinds = datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string"),
                               "kind": datasets.ClassLabel(names=list(names))})
    return datasets.Dataset.from_dict(rows(n, first)[2], features=kinds)


def compare_with_shapes(sets, parts):
    for name, first in parts.items():
        part = getattr(sets, name)
        batch, where = whole(part), part.indices + first
        x, y = draw_shapes(0, where, 8)
        assert torch.equal(as_bytes(batch.images), x) and torch.equal(labels_of(batch.cond), y)
        texts = [sets.vocabulary.decode(row) for row in batch.cond["caption"]]
        assert texts == [f"figure {i}" for i in y.tolist()]


@hub
def test_saved_to_disk_with_and_without_parts(tmp_path):
    table().save_to_disk(tmp_path/"one")
    sets = create_dataset(config(dataset="hf:disk", root=str(tmp_path/"one")))
    assert [len(s) for s in sets[:3]] == [24, 3, 3] and sets.classes == list("abcdefgh")
    compare_with_shapes(sets, dict(train=0, validation=0, test=0))
    seen = torch.cat([part.indices for part in sets[:3]]).sort().values
    assert torch.equal(seen, torch.arange(30))
    three = datasets.DatasetDict(train=table(30), val=table(8, 30), test=table(9, 38))
    three.save_to_disk(tmp_path/"three")
    sets = create_dataset(config(dataset="hf:disk", root=str(tmp_path/"three")))
    assert [len(s) for s in sets[:3]] == [30, 8, 9]
    compare_with_shapes(sets, dict(train=0, validation=30, test=38))


@hub
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_local_files(tmp_path, kind):
    if kind == "parquet": table().to_parquet(tmp_path/"x.parquet")
    else:
        table().save_to_disk(tmp_path/"disk")
        next((tmp_path/"disk").glob("*.arrow")).rename(tmp_path/"x.arrow")
    data = config(dataset=f"hf:{kind}", root=str(tmp_path/f"x.{kind}"))
    sets = create_dataset(data)
    compare_with_shapes(sets, dict(train=0, validation=0, test=0))
    assert describe_data(sets) == describe_data(create_dataset(data))


@hub
def test_another_data_set_is_noticed(tmp_path):
    names = {}
    for name, ds in (("a", table()), ("again", table()), ("b", table(30, 1)), ("c", table(29))):
        ds.save_to_disk(tmp_path/name)
        data = config(dataset="hf:disk", root=str(tmp_path/name))
        names[name] = describe_data(create_dataset(data))
    assert compare_data(names["a"], names["again"]) == []
    for other in ("b", "c"): assert len(compare_data(names["a"], names[other])) >= 3
    known = [sources.HubImages(ds, "picture", None, "x").describe(torch.arange(20))
             for ds in (table(), table(), table(30, 1))]
    assert known[0] == known[1] != known[2]
    one = table().map(lambda row, i: {"text": "moon"} if i == 3 else row, with_indices=True)
    one.save_to_disk(tmp_path/"text")
    changed = describe_data(create_dataset(data.model_copy(update={"root": str(tmp_path/"text")})))
    assert compare_data(names["a"], changed)


@hub
def test_a_folder_of_parquet_with_parts(tmp_path):
    table().to_parquet(tmp_path/"train-00000-of-00001.parquet")
    table(8, 30).to_parquet(tmp_path/"test-00000-of-00001.parquet")
    sets = create_dataset(config(dataset="hf:parquet", root=str(tmp_path)))
    assert [len(s) for s in sets[:3]] == [27, 3, 8]
    compare_with_shapes(sets, dict(train=0, validation=0, test=30))


@hub
def test_imagefolder(tmp_path):
    x, y, _ = rows()
    for i, (image, label) in enumerate(zip(x, y)):
        path = tmp_path/"abcdefgh"[label]/f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    sets = create_dataset(config(dataset="hf:imagefolder", root=str(tmp_path)))
    assert sets.classes == list("abcdefgh") and sets.vocabulary is None
    pictures = {(bytes(a.flatten().tolist()), int(b)) for a, b in zip(x, y)}
    for part in sets[:3]:
        batch = whole(part)
        found = {(bytes(a.flatten().tolist()), int(b))
                 for a, b in zip(as_bytes(batch.images), batch.cond)}
        assert found <= pictures and len(found) == len(part)


@hub
def test_grids_of_numbers_and_names_for_labels(tmp_path):
    x = random(20, 5, dtype=np.uint16)
    kinds = datasets.Features({"grid": datasets.Array3D((5, 8, 8), "uint16"),
                               "sort": datasets.Value("string"), "year": datasets.Value("int32")})
    ds = datasets.Dataset.from_dict({"grid": list(x), "sort": ["b", "a"]*10, "year": [3, 1]*10},
                                    features=kinds)
    ds.save_to_disk(tmp_path/"x")
    data = config(dataset="hf:disk", root=str(tmp_path/"x"), channels=5, label_column="sort")
    sets = create_dataset(data)
    assert sets.classes == ["a", "b"]
    batch = whole(sets.test)
    assert torch.equal(batch.cond, 1 - sets.test.indices % 2)
    expected = torch.from_numpy(x[sets.test.indices.numpy()].astype(np.float32)/65535)*2 - 1
    assert (batch.images - expected).abs().max() < 1e-6
    years = create_dataset(data.model_copy(update={"label_column": "year"}))
    assert years.classes == ["0", "1", "2", "3"]
    assert torch.equal(whole(years.test).cond, 3 - 2*(years.test.indices % 2))


@hub
def test_columns_that_could_be_meant(tmp_path):
    kinds = {"a": datasets.Image(), "b": datasets.Image(), "text": datasets.Value("string"),
             "x": datasets.ClassLabel(names=["0"]), "y": datasets.ClassLabel(names=["0"])}
    find = lambda **kw: sources.find_columns(kinds, config(dataset="hf:disk", **kw))
    with pytest.raises(ValueError, match="data.image_column: a, b could all be meant"): find()
    with pytest.raises(ValueError, match="data.label_column: x, y could"): find(image_column="a")
    with pytest.raises(ValueError, match="data.label_column: found 'z'; the data set has a, b"):
        find(image_column="a", label_column="z")
    found = find(image_column="b", label_column="y")
    assert found == {"image": "b", "label": "y", "caption": "text"}
    with pytest.raises(ValueError, match="data.image_column: no column of images among text"):
        sources.find_columns({"text": kinds["text"]}, config())


@hub
@pytest.mark.parametrize("download", [False, True])
def test_the_hub_that_does_not_answer_is_said_within_seconds(tmp_path, download, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    start = time.monotonic()
    with pytest.raises(ValueError, match="data.dataset: hf:some/thing cannot be") as error:
        create_dataset(config(dataset="hf:some/thing", download=download))
    assert time.monotonic() - start < 10 and "\n" not in str(error.value)
    assert ("does not answer" if download else "--data.download true") in str(error.value)
    assert (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE) == before


@hub
@pytest.mark.parametrize("name, says", [
    ("hf:", "allowed: hf:NAME"), ("hf:disk", "no file or folder"),
    ("hf:parquet", "no file or folder")])
def test_what_is_not_there(tmp_path, name, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        create_dataset(config(dataset=name, root=str(tmp_path/"nowhere")))


@hub
def test_files_that_are_no_data_set(tmp_path):
    (tmp_path/"x.parquet").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="is not read as parquet") as error:
        create_dataset(config(dataset="hf:parquet", root=str(tmp_path/"x.parquet")))
    assert "\n" not in str(error.value)


def test_without_the_library(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'diffusion_model\[hf\]'"):
        create_dataset(config(dataset="hf:disk", root="."))


@hub
def test_a_bad_row_is_an_error_or_left_out(tmp_path):
    ds = table()
    raw = ds.cast_column("picture", datasets.Image(decode=False))
    bad = lambda row, i: {"picture": {"bytes": b"rubbish", "path": None}} if i in (3, 4) else row
    mixed = raw.map(bad, with_indices=True).cast_column("picture", datasets.Image())
    mixed.save_to_disk(tmp_path/"x")
    data = config(dataset="hf:disk", root=str(tmp_path/"x"))
    with pytest.raises(ValueError, match="hf:disk: image [34] cannot be read"):
        for part in create_dataset(data)[:3]: whole(part)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        sets = create_dataset(data.model_copy(update={"bad_images": "skip"}))
        assert sum(len(whole(part).images) for part in sets[:3]) == 28


# -- conditions that are images

@pytest.mark.parametrize("kind, channels, made", [("low_resolution", 3, 3), ("inpainting", 3, 4),
                                                  ("inpainting", 1, 2), ("sketch", 4, 1)])
@pytest.mark.parametrize("size", [16, [8, 24]])
def test_shapes_of_image_conditions(kind, channels, made, size):
    data = DataConfig(image_condition=kind, channels=channels, image_size=size)
    make, x = create_image_condition(data), torch.rand(5, *data.shape)*2 - 1
    y = make(x, torch.arange(5))
    assert make.channels == made and y.shape == (5, made, *data.shape[1:]) and y.isfinite().all()
    pickle.loads(pickle.dumps(make))
    assert create_image_condition(DataConfig()) is None


def test_a_hole_is_a_rectangle_that_depends_on_seed_and_position():
    data = DataConfig(image_condition="inpainting", image_size=[24, 40])
    make, x = create_image_condition(data), torch.rand(200, 3, 24, 40) + 1
    y = make(x, torch.arange(200))
    hole = y[:, 3]
    assert set(hole.unique().tolist()) == {0., 1.}
    assert torch.equal(y[:, :3], x*(1 - hole[:, None]))
    high, wide = hole.amax(2).sum(1), hole.amax(1).sum(1)
    assert torch.equal(hole.sum((1, 2)), high*wide)
    for length, n in ((high, 24), (wide, 40)):
        assert n/4 - 1 <= length.min() and length.max() <= 3*n/4 + 1
    assert torch.equal(make(x[7:9], torch.tensor([7, 8])), y[7:9])
    other = create_image_condition(data.model_copy(update={"data_seed": 1}))
    assert not torch.equal(other(x, torch.arange(200))[:, 3], hole)


def test_where_a_hole_is_says_nothing_about_how_the_image_is_cut_or_mirrored():
    data, n = DataConfig(image_condition="inpainting", image_size=16), 2000
    hole = create_image_condition(data)(torch.zeros(n, 3, 16, 16), torch.arange(n))[:, 3]
    sizes = torch.stack([hole.amax(2).sum(1), hole.amax(1).sum(1)])
    coins = counter_uniform(data.data_seed, "augment", torch.arange(n), 2).T
    assert torch.corrcoef(torch.cat([sizes, coins]))[:2, 2:].abs().max() < 4/n**0.5


def test_a_small_copy_has_lost_what_is_fine_and_kept_what_is_coarse():
    data = DataConfig(image_condition="low_resolution", image_condition_factor=4, image_size=32)
    make = create_image_condition(data)
    line = torch.linspace(-0.9, 0.9, 32).expand(1, 3, 32, 32)
    inside = (make(line, torch.zeros(1)) - line)[..., 4:-4, 4:-4]
    assert inside.abs().max() < 0.05
    chess = ((torch.arange(32)[:, None] + torch.arange(32)) % 2*2. - 1).expand(1, 3, 32, 32)
    assert make(chess, torch.zeros(1)).abs().max() < 0.05
    noise = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert make(noise, torch.zeros(4)).std() < 0.3  # each pixel is a mean of some sixteen
    same = create_image_condition(data.model_copy(update={"image_condition_factor": 1}))
    assert (same(line, torch.zeros(1)) - line).abs().max() < 1e-5
    tiny = create_image_condition(data.model_copy(update={"image_condition_factor": 256}))
    assert (tiny(line, torch.zeros(1)) - line.mean()).abs().max() < 1e-4


def test_a_sketch_is_lines_on_white_whatever_the_normalisation():
    x = torch.zeros(1, 3, 16, 16)
    x[..., 8:] = 1
    lines = {}
    for mean, std in ((0.5, 0.5), (0., 1.)):
        data = DataConfig(image_condition="sketch", image_size=16, mean=mean, std=std)
        lines[std] = create_image_condition(data)((x - mean)/std, torch.zeros(1))
        assert (lines[std][..., 7:9] == -1).all() and (lines[std][..., :7] == 1).all()
        assert (lines[std][..., 9:] == 1).all()
    assert torch.equal(lines[0.5], lines[1.])
    data = DataConfig(image_condition="sketch", image_size=16)
    upright, across = (create_image_condition(data)(y*2 - 1, torch.zeros(1)) for y in (x, x.mT))
    assert torch.equal(across, upright.mT)          # both directions count alike
    other = create_image_condition(data.model_copy(update={"mean": 0., "std": 1.}))
    faint = other(x*0.1, torch.zeros(1))
    assert torch.allclose(faint, create_image_condition(data)(x*0.2 - 1, torch.zeros(1)))
    assert -1 < faint.min() < 1                     # pale lines where there is little to see


@pytest.mark.parametrize("labelled", [True, False])
def test_the_condition_is_of_the_view_that_is_learned(folder, labelled):
    "Cut and mirrored like the image itself; bad images take theirs along."
    if not labelled: folder = folder/"cats"
    else: (folder/"captions.jsonl").unlink()
    data = config(dataset="folder", root=str(folder), image_condition="inpainting",
                  horizontal_flip=True, bad_images="skip")
    bad = sorted(folder.rglob("*.png"))[0]
    bad.write_bytes(b"rubbish")
    sets = create_dataset(data)
    with warnings.catch_warnings(action="ignore"):
        for part in sets[:3]:
            batch = whole(part)
            made = batch.cond["image"]
            assert set(batch.cond) == ({"image", "label"} if labelled else {"image"})
            assert torch.equal(made[:, :3], batch.images*(1 - made[:, 3:]))
            assert len(made) == len(batch.positions) == len(batch.images)
            assert torch.equal(made, create_image_condition(data)(batch.images, batch.positions))


def test_names_that_clash_and_names_that_nobody_knows(tmp_path, monkeypatch):
    np.savez(tmp_path/"x.npz", images=random(20, 3), image=np.zeros((20, 3, 8, 8), np.float32))
    data = config(root=str(tmp_path/"x.npz"))
    assert whole(create_dataset(data).train).cond["image"].shape == (16, 3, 8, 8)
    with pytest.raises(ValueError, match="a condition named image already"):
        create_dataset(data.model_copy(update={"image_condition": "sketch"}))
    with pytest.raises(ValueError, match="known are none, low_resolution"):
        create_image_condition(data.model_copy(update={"image_condition": "sktch"}))
    monkeypatch.setitem(IMAGE_CONDITIONS, "grey", ImageConditionMaker(
        lambda x, u, data: x.mean(1, keepdim=True), 1))
    assert create_image_condition(DataConfig(image_condition="grey")).channels == 1
    monkeypatch.setitem(IMAGE_CONDITIONS, "twice", ImageConditionMaker(
        lambda x, u, data: torch.cat([x, x + u[:, :1, None, None]], 1), lambda c: 2*c, 1))
    sets = create_dataset(DataConfig(dataset="shapes", train_size=9, image_condition="twice"))
    assert whole(sets.train).cond["image"].shape == (9, 6, 32, 32)


# -- whoever reads

@pytest.mark.parametrize("kind", ["array", "mapped float", "captions", "disk", "low_resolution",
                                  "inpainting", "prepared"])
def test_workers_and_resumed_runs_get_the_same(kind, tmp_path, folder):
    if kind == "disk":
        if datasets is None: pytest.skip("the library datasets is not installed")
        table().save_to_disk(tmp_path/"x")
        data = config(dataset="hf:disk", root=str(tmp_path/"x"))
    elif kind == "captions": data = config(dataset="folder", root=str(folder))
    elif kind in ("low_resolution", "inpainting"):
        data = config(dataset="shapes", train_size=30, image_condition=kind)
    else:
        x = random(40, 4, 8, 8 if kind != "prepared" else 16,
                   dtype=np.float32 if kind == "mapped float" else np.uint8)
        if kind == "mapped float": np.save(tmp_path/"x.npy", x)
        else: np.savez(tmp_path/"x.npz", images=x, labels=np.arange(40) % 2, heat=np.arange(40.))
        data = config(root=str(next(tmp_path.glob("x.np*"))), channels=4)
    data = data.model_copy(update={"crop": "random", "horizontal_flip": True})

    def batches(workers, start, n):
        loader = create_loader(create_dataset(data).train, 6, seed=0, start=start,
                               num_workers=workers)
        return list(islice(loader, n))
    straight = batches(0, 0, 8)
    for found, first in ((batches(2, 0, 8), 0), (batches(2, 3, 5), 3), (batches(0, 5, 3), 5)):
        for a, b in zip(straight[first:], found, strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.positions, b.positions)
            assert type(a.cond) is type(b.cond)
            a, b = ({"": c} if isinstance(c, torch.Tensor) else c or {} for c in (a.cond, b.cond))
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_counts_as_labels():
    labels = torch.arange(3)
    assert labels_of(labels) is labels and labels_of({"label": labels, "x": 1}) is labels
    for other in (None, {}, {"x": labels}, labels.float(), labels[:, None],
                  {"label": labels.float()}):
        assert labels_of(other) is None


def test_deep_pictures_of_a_folder_keep_their_levels_and_count_their_bytes(tmp_path):
    for i in range(6):
        x = np.arange(64, dtype=np.uint16).reshape(8, 8)*257 + i
        Image.fromarray(x).save(tmp_path/f"{i}.png")
    sets = create_dataset(config(dataset="folder", root=str(tmp_path), channels=1))
    x = ((whole(sets.train).images + 1)/2*65535).round().long()
    corner = x[:, 0, 0, 0]
    assert set(corner.tolist()) <= set(range(6)) and len(corner.unique()) == len(x)
    source = sets.train.source
    assert source.kept == len(x)*64*4
    lazy = LazySource(lambda i: torch.zeros(3, 8, 8), 9, keep=3*3*64*4 - 1)
    lazy.read(torch.arange(9))
    assert len(lazy.cache) == 2


def test_vocabularies_are_compared_by_words():
    parts = {part: {} for part in ("train", "validation", "test")}
    then, now = (parts | {"vocabulary": Vocabulary(w).words, "classes": None}
                 for w in (["a", "b"], ["b", "a"]))
    assert compare_data(then, now) == ["vocabulary: 2 words then, 2 now: in another order"]
    assert compare_data({}, now) == []
