"Faults 14 to 16: workers, pictures that cannot be read, folders that hold more than pictures."
import struct, warnings, zlib
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_model.checkpoint import find_checkpoint
from diffusion_model.config import DataConfig
from diffusion_model.dataset import create_dataset, create_loader, read_image, scan_folder
from diffusion_model.space import to_uint8
from diffusion_model.tracking import read_metrics
from diffusion_model.transforms import Transform
from runs import words


def config(root, **change):
    return DataConfig(**{"dataset": "folder", "root": str(root), "image_size": 8,
                         "horizontal_flip": False, "validation_fraction": 0.1, **change})


@pytest.fixture
def folder(tmp_path):
    "Twenty pictures, each of one brightness, so that a picture can be told by its mean."
    root = tmp_path/"pictures"
    root.mkdir()
    for i in range(20): Image.new("RGB", (16, 16), (12*i,)*3).save(root/f"{i:02}.png")
    return root


def brightness(images): return [round(x) for x in ((images.mean((1, 2, 3)) + 1)*127.5/12).tolist()]


# -- workers

class Speckled(Transform):
    "A user's own augmentation with NumPy: its numbers come from the position."
    def augment(self, images, positions):
        x = super().augment(images, positions)
        for image, p in zip(x, positions.tolist()):
            noise = np.random.default_rng([self.seed, p]).normal(size=image.shape)
            image += torch.from_numpy(noise).float()
        return x


@pytest.mark.fault(14)
@pytest.mark.parametrize("own", [False, True], ids=["built in", "NumPy"])
def test_workers_change_nothing_and_augment_each_in_its_own_way(folder, own):
    for path in folder.glob("*.png"):
        # All alike, and longer than high.
        Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)*3, (16, 1))).save(path)
    data = config(folder, crop="random", horizontal_flip=True)
    taken = {}
    for workers in (0, 2, 4):
        sets = create_dataset(data)
        if own: sets.train.transform = Speckled(data, True)
        # What generators with a state hold plays no part.
        np.random.seed(workers), torch.manual_seed(workers)
        taken[workers] = list(islice(create_loader(sets.train, 8, seed=0, num_workers=workers), 6))
    for workers in (2, 4):
        for a, b in zip(taken[0], taken[workers], strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.positions, b.positions)
    images = torch.cat([b.images for b in taken[0]])
    different = len(images.flatten(1).unique(dim=0))
    # Of 50 views some come twice.
    assert different == len(images) if own else different > len(images)//2


# -- bad pictures

def png(size, *more):
    "A grey PNG that says it has this size."
    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check
    head = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(b"\0"*100)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def write(path, kind):
    if kind == "truncated":
        Image.effect_noise((64, 64), 50).save(path, "JPEG")
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "empty": path.write_bytes(b"")
    elif kind == "text": path.write_text("I am not a picture")
    elif kind == "large bomb": path.write_bytes(png(30_000))
    else:
        path.write_bytes(png(10_000))  # Pillow alone would only warn of this one, and unpack 100 MB


BAD = ["truncated", "empty", "text", "bomb", "large bomb"]


@pytest.mark.fault(15)
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_picture_is_an_error_of_one_line_with_its_path(folder, kind, workers):
    for i in range(20): write(folder/f"{i:02}.png", kind)
    sets = create_dataset(config(folder))
    with pytest.raises(ValueError,
                       match=r"\d\d.png: not a readable image .*repair or remove") as caught:
        next(iter(create_loader(sets.train, 4, seed=0, num_workers=workers)))
    text = str(caught.value)
    assert str(folder) in text and "--data.bad_images skip" in text and "\n" not in text
    if "bomb" in kind: assert "pixels) exceeds limit of" in text  # what it has and what is allowed


@pytest.mark.fault(15)
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_can_be_left_out_and_counted(folder, kind, workers):
    "Every good picture comes where it would have come, no bad one does; each is named once."
    good = create_dataset(config(folder))
    n = len(good.train)
    learned = {good.train.source.load.paths[i].name for i in good.train.indices.tolist()}
    bad = sorted(learned)[3:6]
    expected = list(islice(create_loader(good.train, 8, seed=0), 3*n//8))
    for name in bad: write(folder/name, kind)
    numbers = {int(name[:2]) for name in bad}
    loader = create_loader(create_dataset(config(folder, bad_images="skip")).train, 8, seed=0,
                           num_workers=workers)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = list(islice(loader, 3*n//8))
    for a, b in zip(expected, found, strict=True):
        stay = torch.tensor([x not in numbers for x in brightness(a.images)])
        assert torch.equal(a.images[stay], b.images) and torch.equal(a.positions[stay], b.positions)
        assert a.cond is None and b.cond is None
    missing = sum(8 - len(b.images) for b in found)
    assert missing == sum(x in numbers for b in expected for x in brightness(b.images)) > len(bad)
    assert sorted(str(w.message).split(": not a readable image")[0][-6:] for w in told) == bad


@pytest.mark.fault(15)
@pytest.mark.parametrize("workers", [0, 2])
def test_labels_stay_with_their_images_where_some_are_left_out(tmp_path, workers):
    "Classes in turn by brightness, so that a label that has slipped shows."
    root = tmp_path/"classes"
    for i in range(20):
        path = root/f"{i % 2}"/f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (12*i,)*3).save(path)
    for i in (3, 4, 10): write(root/f"{i % 2}"/f"{i:02}.png", "text")
    sets = create_dataset(config(root, bad_images="skip"))
    seen = 0
    with warnings.catch_warnings(record=True):
        for batch in islice(create_loader(sets.train, 8, seed=0, num_workers=workers), 6):
            assert batch.cond.tolist() == [x % 2 for x in brightness(batch.images)]
            assert len(batch.positions) == len(batch.images)
            seen += 8 - len(batch.images)
    assert seen > 3


@pytest.mark.fault(15)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_of_which_nothing_is_left(folder, workers):
    for i in range(20): write(folder/f"{i:02}.png", "text")
    sets = create_dataset(config(folder, bad_images="skip", crop="random"))
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        batch = next(iter(create_loader(sets.train, 4, seed=0, num_workers=workers)))
        with pytest.raises(ValueError, match="image 2 of the set cannot be read"): sets.train[2]
    assert batch.images.shape == (0, 3, 8, 8) and batch.images.dtype == torch.float32
    assert batch.cond is None and batch.positions.tolist() == []


@pytest.mark.fault(15)
def test_a_run_names_the_picture_and_ends_or_goes_on(folder, tmp_path, command):
    for i in range(0, 20, 5): write(folder/f"{i:02}.png", "truncated")
    argv = words(tmp_path/"run", dataset="folder", root=folder, batch_size=8, max_steps=6,
                 num_classes=0, guidance_scale=1)
    command.train(*argv)
    command.says(2, folder, ".png: not a readable image", "--data.bad_images skip")
    assert command.err.count("\n") == 1 and not (tmp_path/"run"/"checkpoints").exists()
    command.train(*argv, "--bad_images", "skip")
    command.says(0, "left out, as data.bad_images is skip")
    lines = [line for line in command.err.splitlines() if "not a readable image" in line]
    assert len(lines) == len(set(lines)) == 4
    assert find_checkpoint(tmp_path/"run").name == "step_00000006"


@pytest.mark.fault(15)
@pytest.mark.parametrize("parts, every", [(1, 1), (4, 3)])
def test_a_run_counts_what_is_left_out(folder, tmp_path, command, parts, every):
    "Steps go on with parts of a batch empty; a step of which no image is left at all is the end."
    for i in range(0, 20, 5): write(folder/f"{i:02}.png", "text")
    argv = words(tmp_path/"run", dataset="folder", root=folder, max_steps=9, num_classes=0,
                 guidance_scale=1, bad_images="skip", batch_size=4, accumulation=parts,
                 validation_fraction=0.1, log_every=every)
    command.train(*argv)
    command.says(0, "left out, as data.bad_images is skip")
    sets = create_dataset(config(folder, bad_images="skip"))
    with warnings.catch_warnings(record=True):
        left_out = [4 - len(b.images) for b in islice(create_loader(sets.train, 4, seed=0), 9)]
    # since the line before
    expected = {i + every: sum(left_out[i:i + every]) for i in range(0, 9, every)}
    found = {row["step"]: row.get("skipped", 0) for row in read_metrics(tmp_path/"run")
             if "loss" in row}
    assert found == expected and sum(left_out) >= 4
    for path in folder.iterdir(): write(path, "text")
    command.train(*argv, "--output_dir", tmp_path/"none")
    command.says(2, "step 0: none of its 4 images could be read", "repair the data")


# -- unusual, not bad

@pytest.mark.fault(15)
@pytest.mark.parametrize("name, make, seen", [
    ("16 bit.png", lambda: Image.fromarray(np.full((8, 8), 257*100, np.uint16)), (100, 100, 100)),
    ("cmyk.jpg", lambda: Image.new("CMYK", (8, 8), (255, 0, 0, 0)), (0, 255, 255)),
    ("palette.png", lambda: Image.new("RGB", (8, 8), (200, 30, 90)).quantize(4), (200, 30, 90)),
    ("rgba.png", lambda: Image.new("RGBA", (8, 8), (255, 0, 0, 0)), (0, 128, 0)),  # all background
    ("half.png", lambda: Image.new("RGBA", (8, 8), (255, 0, 0, 128)), (128, 64, 0)),
    ("key.png", lambda: Image.new("P", (8, 8), 0), (0, 128, 0)),  # one colour is transparent
])
def test_unusual_pictures_are_seen_as_they_look(folder, name, make, seen):
    for path in folder.iterdir(): path.unlink()
    for i in range(4):
        make().save(folder/f"{i} {name}", **({"transparency": 0} if name == "key.png" else {}))
    sets = create_dataset(config(folder, background="green"))
    images = to_uint8(sets.train.batch(torch.arange(len(sets.train))).images)
    assert (images.int() - torch.tensor(seen)[:, None, None]).abs().max() <= 2  # JPEG


# -- folders

@pytest.mark.fault(16)
def test_what_else_lies_in_a_folder(tmp_path):
    for name in ("cats/1.png", "cats/2.JPG", "dogs/3.Jpeg", "dogs/deep/4.png"):
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path/name)
    for name in (".ipynb_checkpoints/1-checkpoint.png", "cats/.ipynb_checkpoints/1.png",
                 "cats/._a.png", "._b.png", ".DS_Store", "cats/Thumbs.db", "notes.txt"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_bytes(b"not a picture")
    paths, labels, classes = scan_folder(tmp_path)
    found = [p.relative_to(tmp_path).as_posix() for p in paths]
    assert found == ["cats/1.png", "cats/2.JPG", "dogs/3.Jpeg", "dogs/deep/4.png"]
    assert (labels, classes) == ([0, 0, 1, 1], ["cats", "dogs"])
    for path in paths: read_image(path)


@pytest.mark.fault(16)
@pytest.mark.parametrize("hollow", ["birds", "."])
def test_an_empty_folder_is_named_with_the_suffixes(folder, tmp_path, command, hollow):
    "An empty class, and a folder without any picture."
    root = tmp_path/"all"
    (root/hollow).mkdir(parents=True)
    (root/hollow/"._a.png").write_bytes(b"hidden")
    if hollow != ".": folder.rename(root/"cats")
    command.train(*words(tmp_path/"run", dataset="folder", root=root, num_classes=0,
                         guidance_scale=1))
    command.says(2, root/hollow, "no images", ".png .jpg .jpeg")
    assert not (tmp_path/"run"/"checkpoints").exists()
