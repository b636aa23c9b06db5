"Data sets: drawn, from folders, from torchvision; and the loader that is addressed by position."
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusion_model import dataset
from diffusion_model.config import DataConfig
from diffusion_model.counters import permutation
from diffusion_model.dataset import (Batch, ImageSet, Shapes, create_dataset, create_loader,
                                     draw_shapes, scan_folder)
from diffusion_model.transforms import create_transform

REAL = Path(__file__).resolve().parent.parent.parent/"shared"/"data"
real = pytest.mark.skipif(not REAL.exists(), reason="the real data sets are not beside the project")


def config(**kw):
    return DataConfig(**{"dataset": "shapes", "train_size": 40, "validation_size": 10,
                         "test_size": 10, "image_size": 16, "horizontal_flip": False, **kw})


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
    assert images.shape == (64, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert torch.equal(draw_shapes(0, torch.tensor([9]))[0][0], images[9])
    assert set(labels.tolist()) == set(range(len(Shapes.classes))) and len(Shapes.classes) >= 8


def test_splits_and_seeds_never_meet():
    drawn = [draw_shapes(0, torch.arange(200), 16)[0],
             Shapes(200, 16, 1).read(torch.arange(200))[0]]
    drawn += [Shapes(200, 16, 0, split).read(torch.arange(200))[0]
              for split in ("validation", "test")]
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
    images, labels, _ = sets.train.batch(torch.arange(4), torch.arange(4))
    assert images.dtype == torch.float32 and -1 <= images.min() < images.max() <= 1
    image, label = sets.train[3]
    assert torch.equal(image, images[3]) and label == labels[3]


def test_grey_shapes():
    two = torch.arange(2)
    assert create_dataset(config(channels=1)).train.batch(two, two)[0].shape == (2, 1, 16, 16)


def test_folder_with_classes(folder):
    sets = create_dataset(config(dataset="folder", root=str(folder), validation_fraction=0.2))
    assert sets.classes == ["cats", "dogs"] and sum(len(s) for s in sets[:3]) == 9
    assert all(len(s) for s in sets[:3])
    images, labels, _ = sets.train.batch(torch.arange(len(sets.train)),
                                         torch.arange(len(sets.train)))
    assert images.shape[1:] == (3, 16, 16) and set(labels.tolist()) <= {0, 1}


def test_flat_folder_has_no_labels(folder):
    sets = create_dataset(config(dataset="folder", root=str(folder/"cats")))
    assert sets.classes is None
    assert sets.train.batch(torch.tensor([0]), torch.tensor([0])).cond is None


def test_splits_of_a_folder_are_disjoint(folder):
    sets = create_dataset(config(dataset="folder", root=str(folder), validation_fraction=0.2))
    parts = [set(s.indices.tolist()) for s in sets[:3]]
    assert set.union(*parts) == set(range(9)) and sum(map(len, parts)) == 9


def test_folder_errors(folder, tmp_path):
    make = lambda root: create_dataset(config(dataset="folder", root=str(root)))
    with pytest.raises(FileNotFoundError, match="nowhere"): make(tmp_path/"nowhere")
    (tmp_path/"hollow").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images in .*hollow.*\.png"):
        make(tmp_path/"hollow")
    with pytest.raises(ValueError, match="hollow"): make(folder)  # a class without images


@pytest.mark.parametrize("name, says", [("FashonMNIST", "FashionMNIST"), ("shape", "shapes"),
                                        ("qqqq", "known are")])
def test_unknown_data_sets(name, says):
    with pytest.raises(ValueError, match=says): create_dataset(config(dataset=name))


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data.download true"):
        create_dataset(config(dataset="MNIST", root=str(tmp_path)))


@pytest.mark.parametrize("download", [False, True])
def test_torchvision_is_told_what_to_do(tmp_path, monkeypatch, download):
    "Training and test part, from the folder that was named, fetched only where that is allowed."
    from torchvision import datasets
    asked = []

    class MNIST:
        def __init__(self, root, train=True, transform=None, download=False):
            asked.append((root, train, download))
            self.data = torch.zeros(9, 28, 28, dtype=torch.uint8)
            self.targets = torch.arange(9)

        def __len__(self): return 9
    monkeypatch.setattr(datasets, "MNIST", MNIST)
    create_dataset(config(dataset="MNIST", root=str(tmp_path), download=download))
    assert asked == [(str(tmp_path), True, download), (str(tmp_path), False, download)]


@real
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_real_torchvision(name):
    sets = create_dataset(config(dataset=name, root=str(REAL), channels=1, image_size=32))
    assert [len(s) for s in sets[:3]] == [57_000, 3_000, 10_000] and len(sets.classes) == 10
    images, labels, _ = sets.test.batch(torch.arange(8), torch.arange(8))
    assert images.shape == (8, 1, 32, 32) and images.min() < -0.9 and images.max() > 0.5


@real
def test_real_folder():
    sets = create_dataset(config(dataset="folder", root=str(REAL/"noto-emoji"/"72"), image_size=32))
    assert sum(len(s) for s in sets[:3]) == 3583 and sets.classes is None
    images, _, _ = sets.train.batch(torch.arange(8), torch.arange(8))
    assert (images[:, :, 0, 0] > 0.9).all()  # transparent corners became white


# The loader
def take(n, **kw):
    sets = create_dataset(config(horizontal_flip=True))
    return list(islice(iter(create_loader(sets.train, 12, 0, **kw)), n))


def same(a, b):
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True)
               for x, y in zip(p, q, strict=True))


@pytest.mark.mended(15)
def test_each_epoch_has_its_own_order_and_each_seed_its_own():
    loader = create_loader(create_dataset(config()).train, 40, seed=3)  # a step is an epoch
    orders = [loader.address(step)[0] for step in range(4)]
    for epoch, order in enumerate(orders): assert torch.equal(order, permutation(3, epoch, 40))
    assert len({tuple(order.tolist()) for order in orders}) == 4


@pytest.mark.parametrize("name", ["shapes", "folder"])
def test_only_training_images_change_with_their_position(folder, name):
    for path in folder.glob("*/*"):  # wider than high, and getting lighter to the right
        if path.suffix in (".png", ".JPG", ".webp") and not path.name.startswith("."):
            Image.linear_gradient("L").rotate(90).resize((40, 20)).save(path)
    sets = create_dataset(config(dataset=name, root=str(folder), crop="random", image_size=8,
                                 horizontal_flip=True))
    for part, same in zip(sets, (False, True, True)):
        first = torch.zeros(30, dtype=torch.long)
        views = part.batch(first, torch.arange(30)).images
        assert (views == views[:1]).all() == same


def test_resuming_is_arithmetic(): assert same(take(9)[4:], take(5, start=4))


def test_processes_share_the_batch():
    whole, left, right = take(5), take(5, rank=0, world=2), take(5, rank=1, world=2)
    for w, l, r in zip(whole, left, right):
        assert torch.equal(w.images, torch.cat([l.images, r.images]))


def test_each_epoch_shows_each_image_once():
    batches = take(10)  # 120 samples: three epochs of 40
    images = torch.cat([b.images for b in batches]).view(3, 40, -1)
    sums = images.abs().sum(-1).sort(1).values  # a flip does not change it
    assert torch.allclose(sums[0], sums[1], rtol=1e-5)
    assert torch.allclose(sums[0], sums[2], rtol=1e-5)


@pytest.mark.parametrize("size, kw, says", [(41, {}, "40 images"), (0, {}, "at least 1"),
                                            (5, dict(world=2), "cannot share"),
                                            (4, dict(rank=2, world=2), "rank"),
                                            (4, dict(start=-1), "start")])
def test_loader_refusals(size, kw, says):
    with pytest.raises(ValueError, match=says):
        create_loader(create_dataset(config()).train, size, 0, **kw)


# Traps that a folder, a platform or torchvision sets
@pytest.mark.fault(22)
def test_links_are_not_followed(folder):
    (folder/"cats"/"inside.png").symlink_to(folder/"dogs"/"6.png")
    assert len(scan_folder(folder)[0]) == 10
    for target in (folder, "/etc"):
        (folder/"cats"/"link").symlink_to(target)
        with pytest.raises(ValueError, match="link: links to folders"): scan_folder(folder)
        (folder/"cats"/"link").unlink()
    (folder/"cats"/"outside.png").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="outside.png: links"): scan_folder(folder)


def test_split_folders_are_not_taken_for_classes(folder):
    root = folder/"both"
    for name in ("train", "test"):
        (root/name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root/name/"a.png")
    with pytest.raises(ValueError, match="test and train, which would become classes"):
        scan_folder(root)


def test_a_new_picture_moves_no_other(folder):
    def parts():
        sets = create_dataset(config(dataset="folder", root=str(folder), validation_fraction=0.2))
        return [{sets.train.source.load.paths[i].name for i in s.indices.tolist()}
                for s in sets[:3]]
    before = parts()
    Image.new("RGB", (9, 9)).save(folder/"dogs"/"new.png")
    assert sum(len(a - b) for a, b in zip(before, parts())) <= 2  # at the cuts, at most


def test_spawned_workers_and_the_global_generator(folder, monkeypatch):
    import torch.utils.data as data
    from torch import multiprocessing
    sets = create_dataset(config(dataset="folder", root=str(folder), crop="random",
                                 horizontal_flip=True))
    state, started = torch.get_rng_state(), []

    class Spawning(data.DataLoader):
        def __init__(self, *args, **kw):
            started.append(1)
            super().__init__(*args, multiprocessing_context=multiprocessing.get_context("spawn"),
                             **kw)
    monkeypatch.setattr(dataset, "DataLoader", Spawning)
    there = list(islice(create_loader(sets.train, 3, seed=0, num_workers=1), 4))
    here = list(islice(create_loader(sets.train, 3, seed=0), 4))
    assert started and same(there, here)
    assert torch.equal(torch.get_rng_state(), state)


def test_decoded_images_are_kept_and_a_truth_for_each(folder):
    sets = create_dataset(config(dataset="folder", root=str(folder)))
    first = sets.train.batch(torch.arange(len(sets.train)))
    for path in folder.glob("*/[0-9]*"): path.unlink()
    again = sets.train.batch(torch.arange(len(sets.train)))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


class Held:
    "Stands for a torchvision data set that holds an array."
    def __init__(self, data, labels): self.data, self.labels = data, labels
    def __len__(self): return len(self.data)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_layouts_of_torchvisions_arrays(layout):
    x = torch.randint(0, 256, (5, 1 if layout == "NHW" else 3, 8, 9), dtype=torch.uint8)
    data = {"NHWC": x.permute(0, 2, 3, 1), "NCHW": x, "NHW": x[:, 0]}[layout].numpy()
    source = dataset._source(Held(data, [4, 3, 2, 1, 0]), None)
    images, labels = source.read(torch.tensor([3, 0]))
    assert torch.equal(images, x[[3, 0]]) and labels.tolist() == [1, 4]
    assert source.classes == ["0", "1", "2", "3", "4"]


def test_sets_without_an_array_are_read_item_by_item():
    class Items:
        _samples = [("a.png", 1), ("b.png", 0)]
        def __len__(self): return 2
        def __getitem__(self, i): return Image.new("L", (7, 9), 100*i), self._samples[i][1]
    transform = create_transform(config())
    source = dataset._source(Items(), transform)
    images, labels, _ = ImageSet(source, transform).batch(torch.tensor([1, 0]))
    assert labels.tolist() == [0, 1] and source.classes == ["0", "1"]
    assert [round(x.item()) for x in (images.mean((1, 2, 3)) + 1)*127.5] == [100, 0]


@pytest.mark.parametrize("name", ["Kinetics", "PhotoTour", "VOCDetection", "FakeData"])
def test_sets_that_need_more_than_a_split_are_unknown(name, tmp_path):
    with pytest.raises(ValueError, match=f"data.dataset: found '{name}'"):
        create_dataset(config(dataset=name, root=str(tmp_path)))


def test_a_set_without_the_usual_split_says_so(tmp_path):
    with pytest.raises(ValueError, match="EMNIST has no usual training and test split"):
        create_dataset(config(dataset="EMNIST", root=str(tmp_path)))


def test_drawing_does_not_depend_on_the_batch():
    whole = draw_shapes(5, torch.arange(1001))[0]
    for n in (1, 7, 64):
        assert torch.equal(draw_shapes(5, torch.arange(900, 900 + n))[0], whole[900:900 + n])


def test_every_colour_stands_out_from_its_ground():
    "WCAG's contrast ratio, at the ground's least favourable place."
    def luminance(rgb):
        linear = torch.where(rgb <= 0.04045, rgb/12.92, ((rgb + 0.055)/1.055)**2.4)
        return linear @ torch.tensor([0.2126, 0.7152, 0.0722])
    hues = torch.linspace(0, 1, 100)[:, None]
    back = luminance(dataset._grounds(hues, 32, 32).movedim(1, -1)).flatten()
    front = luminance(dataset.PALETTE)[:, None]
    ratio = (torch.maximum(front, back) + 0.05)/(torch.minimum(front, back) + 0.05)
    assert ratio.min() > 2.5


@pytest.mark.parametrize("workers", [0, 1])
def test_the_first_batch_that_cannot_be_read_ends_the_loop(workers):
    "Batches before it come; it is an error, and not left out in silence."
    class Breaks:
        def __len__(self): return 12
        def batch(self, _, positions):
            if 4 in positions.tolist(): raise ValueError("image 4 is broken")
            return Batch(torch.zeros(len(positions), 1, 2, 2), None, positions)
    batches = iter(create_loader(Breaks(), 4, seed=0, num_workers=workers))
    assert next(batches).positions.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="image 4 is broken"): next(batches)
