"Data sets: drawn, from folders, from torchvision; and the loader that is addressed by position."
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusion_model.config import DataConfig
from diffusion_model.dataset import Shapes, create_dataset, create_loader, draw_shapes

REAL = Path(__file__).resolve().parent.parent.parent/"shared"/"data"
real = pytest.mark.skipif(not REAL.exists(), reason="the real data sets are not beside the project")


def config(**kw): return DataConfig(**{"dataset": "shapes", "train_size": 40, "validation_size": 10, "test_size": 10,
                                       "image_size": 16, "horizontal_flip": False, **kw})


@pytest.fixture
def folder(tmp_path):
    "Nine pictures in two classes, and what a folder collects besides."
    for i in range(9):
        path = tmp_path/("cats" if i < 5 else "dogs")/f"{i}.{('png', 'JPG', 'webp')[i % 3]}"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20 + i, 30), (25*i, 100, 200)).save(path)
    for trap in (".ipynb_checkpoints/a.png", "cats/._1.png", "cats/notes.txt"):
        (tmp_path/trap).parent.mkdir(exist_ok=True)
        (tmp_path/trap).write_bytes(b"not an image")
    return tmp_path


# Shapes
def test_shapes_are_fixed_and_labelled():
    images, labels = draw_shapes(0, torch.arange(64), 32)
    assert images.shape == (64, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert torch.equal(draw_shapes(0, torch.tensor([9]))[0][0], images[9])
    assert set(labels.tolist()) == set(range(len(Shapes.classes))) and len(Shapes.classes) >= 8


def test_splits_and_seeds_never_meet():
    drawn = [draw_shapes(0, torch.arange(200), 16)[0], Shapes(200, 16, 1).read(torch.arange(200))[0]]
    drawn += [Shapes(200, 16, 0, split).read(torch.arange(200))[0] for split in ("validation", "test")]
    pictures = [{bytes(x.flatten().tolist()) for x in part} for part in drawn]
    for i in range(4):
        for j in range(i): assert not pictures[i] & pictures[j]


@pytest.mark.parametrize("size", [1, 8, 17, 96])
def test_any_size(size): assert draw_shapes(0, torch.arange(3), size)[0].shape == (3, 3, size, size)


def test_the_figure_stands_out():
    images, _ = draw_shapes(0, torch.arange(500), 32)
    x = images.float()
    corner, middle = x[:, :, :2, :2].mean((2, 3)), x[:, :, 8:24, 8:24]
    assert ((middle - corner[:, :, None, None]).abs().amax((1, 2, 3)) > 90).all()


# The factory
def test_shapes_through_the_factory():
    sets = create_dataset(config())
    assert [len(s) for s in sets[:3]] == [40, 10, 10] and sets.classes == list(Shapes.classes)
    images, labels = sets.train.batch(torch.arange(4), torch.arange(4))
    assert images.dtype == torch.float32 and -1 <= images.min() < images.max() <= 1
    image, label = sets.train[3]
    assert torch.equal(image, images[3]) and label == labels[3]


def test_grey_shapes():
    assert create_dataset(config(channels=1)).train.batch(torch.arange(2), torch.arange(2))[0].shape == (2, 1, 16, 16)


def test_folder_with_classes(folder):
    sets = create_dataset(config(dataset="folder", root=str(folder), validation_fraction=0.2))
    assert sets.classes == ["cats", "dogs"] and sum(len(s) for s in sets[:3]) == 9
    assert all(len(s) for s in sets[:3])
    images, labels = sets.train.batch(torch.arange(len(sets.train)), torch.arange(len(sets.train)))
    assert images.shape[1:] == (3, 16, 16) and set(labels.tolist()) <= {0, 1}


def test_flat_folder_has_no_labels(folder):
    sets = create_dataset(config(dataset="folder", root=str(folder/"cats")))
    assert sets.classes is None
    assert sets.train.batch(torch.tensor([0]), torch.tensor([0]))[1].tolist() == [-1]


def test_splits_of_a_folder_are_disjoint(folder):
    sets = create_dataset(config(dataset="folder", root=str(folder), validation_fraction=0.2))
    parts = [set(s.indices.tolist()) for s in sets[:3]]
    assert set.union(*parts) == set(range(9)) and sum(map(len, parts)) == 9


def test_folder_errors(folder, tmp_path):
    make = lambda root: create_dataset(config(dataset="folder", root=str(root)))
    with pytest.raises(FileNotFoundError, match="nowhere"): make(tmp_path/"nowhere")
    (tmp_path/"hollow").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images in .*hollow.*\.png"): make(tmp_path/"hollow")
    with pytest.raises(ValueError, match="hollow"): make(folder)  # a class without images


@pytest.mark.parametrize("damage", [b"", b"not an image"])
def test_bad_image_is_named(folder, damage):
    (folder/"cats"/"bad.png").write_bytes(damage)
    sets = create_dataset(config(dataset="folder", root=str(folder)))
    with pytest.raises(ValueError, match="bad.png"):
        for part in sets[:3]: part.batch(torch.arange(len(part)), torch.arange(len(part)))


def test_truncated_image_is_named(folder):
    whole = folder/"cats"/"0.png"
    whole.write_bytes(whole.read_bytes()[:60])
    sets = create_dataset(config(dataset="folder", root=str(folder)))
    with pytest.raises(ValueError, match="0.png"):
        for part in sets[:3]: part.batch(torch.arange(len(part)), torch.arange(len(part)))


@pytest.mark.parametrize("name, says", [("FashonMNIST", "FashionMNIST"), ("shape", "shapes"), ("qqqq", "known are")])
def test_unknown_data_sets(name, says):
    with pytest.raises(ValueError, match=says): create_dataset(config(dataset=name))


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data.download true"):
        create_dataset(config(dataset="MNIST", root=str(tmp_path)))


@real
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_real_torchvision(name):
    sets = create_dataset(config(dataset=name, root=str(REAL), channels=1, image_size=32))
    assert [len(s) for s in sets[:3]] == [57_000, 3_000, 10_000] and len(sets.classes) == 10
    images, labels = sets.test.batch(torch.arange(8), torch.arange(8))
    assert images.shape == (8, 1, 32, 32) and images.min() < -0.9 and images.max() > 0.5


@real
def test_real_folder():
    sets = create_dataset(config(dataset="folder", root=str(REAL/"noto-emoji"/"72"), image_size=32))
    assert sum(len(s) for s in sets[:3]) == 3583 and sets.classes is None
    images, _ = sets.train.batch(torch.arange(8), torch.arange(8))
    assert (images[:, :, 0, 0] > 0.9).all()  # transparent corners became white


# The loader
def take(n, **kw):
    sets = create_dataset(config(horizontal_flip=True))
    return list(islice(iter(create_loader(sets.train, 12, 0, **kw)), n))


def same(a, b): return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def test_resuming_is_arithmetic(): assert same(take(9)[4:], take(5, start=4))


def test_processes_share_the_batch():
    whole, left, right = take(5), take(5, rank=0, world=2), take(5, rank=1, world=2)
    for w, l, r in zip(whole, left, right): assert torch.equal(w.images, torch.cat([l.images, r.images]))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers): assert same(take(5), take(5, num_workers=workers))


def test_each_epoch_shows_each_image_once():
    batches = take(10)  # 120 samples: three epochs of 40
    images = torch.cat([b.images for b in batches]).view(3, 40, -1)
    sums = images.abs().sum(-1).sort(1).values  # a flip does not change it
    assert torch.allclose(sums[0], sums[1], rtol=1e-5) and torch.allclose(sums[0], sums[2], rtol=1e-5)


@pytest.mark.parametrize("size, kw, says", [(41, {}, "40 images"), (0, {}, "at least 1"), (5, dict(world=2), "cannot share"),
                                            (4, dict(rank=2, world=2), "rank"), (4, dict(start=-1), "start")])
def test_loader_refusals(size, kw, says):
    with pytest.raises(ValueError, match=says): create_loader(create_dataset(config()).train, size, 0, **kw)
