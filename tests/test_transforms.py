"Edges of the transforms: modes, sizes, exactness, independence of batches."
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from diffusion_model.config import DataConfig
from diffusion_model.space import Pixels, to_uint8
from diffusion_model.transforms import (
    as_channels, create_transform, random_crop, random_flip, resize_crop, to_float, to_tensor)

EVERY = torch.arange(256).to(torch.uint8)


def noise_image(h=20, w=30, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (h, w, channels), dtype=np.uint8)
    return Image.fromarray(x[..., 0] if channels == 1 else x)


@pytest.mark.parametrize("mean, std", [(0.5, 0.5), (0., 1.), (0.4914, 0.2470), (0.1307, 0.3081)])
def test_every_byte_comes_back(mean, std):
    space = Pixels(DataConfig(mean=mean, std=std))
    assert torch.equal(space.decode(to_float(EVERY, mean, std)), EVERY)


def test_out_of_range_is_clamped_and_not_wrapped():
    x = torch.tensor([-5., -1.001, -1., 1., 1.001, 5., float("inf"), -float("inf")])
    assert to_uint8(x).tolist() == [0, 0, 0, 255, 255, 255, 255, 0]


def test_half_precision_samples_come_back():
    x = to_float(EVERY).to(torch.bfloat16)
    assert (to_uint8(x).int() - EVERY.int()).abs().max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV",
                                  "LAB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_modes(mode, channels):
    base = Image.new("RGB", (8, 6), (255, 255, 255))
    image = base.convert("L").convert("LA") if mode == "LA" else (
        Image.new("LAB", (8, 6), (255, 128, 128)) if mode == "LAB" else base.convert(mode))
    x = to_tensor(image, channels)
    assert x.shape == (channels, 6, 8) and x.dtype == torch.uint8
    if mode != "LAB": assert x.min() >= 254  # white stays white


def test_palette_with_transparency_and_key_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 1
    x = to_tensor(image, background="#00ff00")
    assert x[:, 0].T.tolist() == [[255, 0, 0], [0, 255, 0]]


def test_sixteen_bits():
    x = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    deep = to_tensor(Image.fromarray(x), 1)
    assert deep.dtype == torch.float32
    assert torch.equal(to_uint8(to_float(deep)).flatten(), EVERY)
    assert to_tensor(Image.fromarray(x), 3).shape == (3, 16, 16)


def test_sixteen_bits_are_not_eight(tmp_path):
    "All 65,536 levels stay apart, whatever the file's format; black and white are where they were."
    x = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for suffix in ("png", "tif"):
        Image.fromarray(x).save(tmp_path/f"x.{suffix}")
        with Image.open(tmp_path/f"x.{suffix}") as image: deep = to_tensor(image, 1)
        assert torch.equal(deep.flatten(), torch.arange(65536).float()/65535)
    same = create_transform(DataConfig(image_size=256, channels=1))
    assert len(same(Image.fromarray(x)).unique()) == 65536


def test_floating_point_images_have_the_range_of_black_to_white(tmp_path):
    x = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(x).save(tmp_path/"x.tif")
    with Image.open(tmp_path/"x.tif") as image: assert (to_tensor(image, 1)[0].numpy() == x).all()
    for wrong in (-0.01, 1.01, np.nan, np.inf):
        y = x.copy()
        y[3, 3] = wrong
        with pytest.raises(ValueError, match="mode F .*which value is white: .*floats from 0 to 1"):
            to_tensor(Image.fromarray(y))


def test_bicubic_does_not_leave_the_range():
    edge = torch.zeros(1, 8, 8)
    edge[..., 4:] = 1
    for size in (13, 5, (16, 8)):
        y = resize_crop(edge, size)
        assert y.min() == 0 and y.max() == 1 and y.dtype == torch.float32


def test_alpha_can_be_asked_for():
    image = noise_image(4, 5)
    image.putalpha(Image.fromarray(np.arange(20, dtype=np.uint8).reshape(4, 5)))
    assert torch.equal(to_tensor(image, 4), F.pil_to_tensor(image))
    assert torch.equal(to_tensor(image, 2), F.pil_to_tensor(image.convert("LA")))
    assert (to_tensor(noise_image(), 4)[3] == 255).all()
    assert to_tensor(noise_image(), 2).shape[0] == 2
    with pytest.raises(ValueError, match="data.channels: found 5, but an image of 3: set it to 1"):
        to_tensor(noise_image(), 5)


def test_bytes_and_deeper_pictures_in_one_batch():
    learn = create_transform(DataConfig(image_size=8, channels=1))
    white = [Image.new("L", (8, 8), 255), Image.fromarray(np.full((8, 8), 65535, np.uint16))]
    x = learn.augment([learn.prepare(w) for w in white], torch.arange(2))
    assert (x == 1).all() and x.dtype == torch.float32


def _before(x, size, crop):
    "How squares were cut before there was anything else."
    h, w = x.shape[-2:]
    if crop == "center":
        h = w = min(h, w)
        x = F.center_crop(x, [h, w])
    short = min(h, w)
    shape = [size, size] if crop == "none" else [round(h*size/short), round(w*size/short)]
    return x if [h, w] == shape else F.resize(x, shape, InterpolationMode.BICUBIC, antialias=True)


@pytest.mark.parametrize("crop", ["center", "none", "random"])
def test_squares_are_what_they_were(crop):
    rng = np.random.default_rng(0)
    for h, w in [*rng.integers(1, 90, (40, 2)).tolist(), (1, 90), (17, 17), (333, 100)]:
        x = torch.from_numpy(rng.integers(0, 256, (3, h, w), dtype=np.uint8))
        for size in (8, 31, 32):
            assert torch.equal(resize_crop(x, size, crop), _before(x, size, crop)), (h, w, size)
    x = (EVERY.float()/255 - 0.3)/0.7
    assert torch.equal(to_float(EVERY, 0.3, 0.7), x)


@pytest.mark.parametrize("size", [(8, 24), (24, 8), (16, 16), (7, 30), (1, 9)])
def test_windows_of_any_aspect(size):
    "The window has the aspect to a pixel, is the largest there is, and stands in the middle."
    rng = np.random.default_rng(1)
    for h, w in rng.integers(1, 120, (60, 2)).tolist():
        x = torch.full((1, h, w), 77, dtype=torch.uint8)
        for crop in ("center", "none"): assert resize_crop(x, size, crop).shape == (1, *size)
        y = resize_crop(x, size, "random")
        assert (y == 77).all() and (y.shape[1] == size[0] or y.shape[2] == size[1])
        assert y.shape[1] >= size[0] and y.shape[2] >= size[1]
        for u in (0., 1 - 2**-24):
            assert random_crop([y], size, torch.tensor([u])).shape[2:] == size
    x = torch.arange(40, dtype=torch.uint8).expand(1, 10, 40)
    assert resize_crop(x, (10, 20))[0, 0].tolist() == list(range(10, 30))
    assert resize_crop(x.mT, (20, 10))[0, :, 0].tolist() == list(range(10, 30))


def test_a_transform_that_is_not_square():
    for crop in ("center", "random", "none"):
        data = DataConfig(image_size=[8, 24], channels=1, crop=crop)
        learn = create_transform(data, True)
        images = [learn.prepare(noise_image(20, 30 + i)) for i in range(5)]
        assert learn.augment(images, torch.arange(5)).shape == (5, 1, 8, 24)
        assert learn.augment([], torch.arange(0)).shape == (0, 1, 8, 24)
    flipped = create_transform(DataConfig(image_size=[8, 24]), True)
    x = flipped.prepare(noise_image(8, 24))
    seen = {tuple(y.flatten().tolist()) for y in flipped.augment([x]*20, torch.arange(20))}
    assert seen == {tuple(to_float(y).flatten().tolist()) for y in (x, x.flip(-1))}


def test_camera_orientation_is_applied():
    image = noise_image(4, 6)
    image.getexif()[0x0112] = 6  # turned by a quarter
    turned = to_tensor(image)
    assert turned.shape == (3, 6, 4)
    assert torch.equal(turned, F.pil_to_tensor(image).rot90(-1, (1, 2)))


def test_channels():
    grey = EVERY.view(1, 16, 16)
    assert torch.equal(as_channels(grey, 3), grey.expand(3, 16, 16))
    assert (as_channels(grey.expand(3, 16, 16), 1).int() - grey.int()).abs().max() <= 1
    assert as_channels(grey[None].expand(5, 1, 16, 16), 3).shape == (5, 3, 16, 16)
    with pytest.raises(ValueError, match="found 2 channels"):
        as_channels(torch.zeros(2, 4, 4, dtype=torch.uint8), 3)


@pytest.mark.parametrize("h, w", [(32, 32), (31, 47), (47, 31), (1, 1), (1, 90), (200, 33),
                                  (28, 28)])
@pytest.mark.parametrize("crop", ["center", "none", "random"])
def test_sizes(h, w, crop):
    x = resize_crop(torch.full((3, h, w), 77, dtype=torch.uint8), 32, crop)
    assert min(x.shape[-2:]) == 32 and (crop == "random" or x.shape == (3, 32, 32))
    assert (x == 77).all()


def test_the_right_size_is_left_alone():
    x = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert all(torch.equal(resize_crop(x, 32, crop), x) for crop in ("center", "none", "random"))


def test_center_is_the_centre():
    x = torch.arange(10, dtype=torch.uint8).expand(3, 4, 10)
    assert resize_crop(x, 4)[0, 0].tolist() == [3, 4, 5, 6]


def test_windows_reach_both_ends_and_never_leave():
    x = torch.arange(10, dtype=torch.uint8).expand(1, 4, 10)
    u = torch.tensor([0., 1 - 2**-24])
    assert random_crop([x, x], 4, u)[:, 0, 0].tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    tall = random_crop([x.mT, x.mT], 4, u)
    assert tall[:, 0, :, 0].tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]


def test_a_batch_is_cut_like_a_list():
    x = torch.randint(0, 256, (50, 3, 20, 31), dtype=torch.uint8)
    u = torch.rand(50)
    u[:2] = torch.tensor([0., 1 - 2**-24])
    for size in (20, (20, 9), (7, 31), (20, 31)):
        assert torch.equal(random_crop(x, size, u), random_crop(list(x), size, u))


def test_flip_is_per_image():
    x = torch.randint(0, 256, (3, 3, 4, 5), dtype=torch.uint8)
    y = random_flip(x, torch.tensor([0.1, 0.5, 0.49]))
    assert torch.equal(y[0], x[0].flip(-1)) and torch.equal(y[1], x[1])
    assert torch.equal(y[2], x[2].flip(-1))


def test_augmentation_depends_on_seed_and_position_only():
    data = DataConfig(crop="random", horizontal_flip=True)
    learn = create_transform(data, True)
    images = [learn.prepare(noise_image(40, 70, seed=i)) for i in range(12)]
    positions = torch.arange(10**12, 10**12 + 12)
    whole = learn.augment(images, positions)
    for cut in (1, 5, 11):
        parts = [learn.augment(images[:cut], positions[:cut]),
                 learn.augment(images[cut:], positions[cut:])]
        assert torch.equal(whole, torch.cat(parts))
    other = create_transform(DataConfig(crop="random", horizontal_flip=True, data_seed=1), True)
    assert not torch.equal(whole, other.augment(images, positions))
    assert not torch.equal(whole, learn.augment(images, positions + 1))


def test_evaluation_ignores_the_position_and_inverts():
    data = DataConfig(crop="random", horizontal_flip=True, mean=0.4, std=0.3)
    judge = create_transform(data)
    image = noise_image(32, 32)
    assert torch.equal(judge(image, 3), judge(image, 4))
    assert torch.equal(Pixels(data).decode(judge(image)), F.pil_to_tensor(image))
    assert judge(image).dtype == torch.float32


def test_tensor_and_picture_give_the_same():
    judge = create_transform(DataConfig(image_size=16))
    image = noise_image(20, 30)
    assert torch.equal(judge(image), judge(F.pil_to_tensor(image)))


@pytest.mark.mended(15)
@pytest.mark.parametrize("tall", [False, True])
def test_where_it_is_cut_says_nothing_about_whether_it_is_mirrored(tall):
    "Read off the images that the transform makes: of a ramp, and of one that lies across it."
    n, long, short = 10_000, torch.arange(40), torch.arange(16)
    picture = long[:, None]*2 + short*8 if tall else (long*5).expand(16, 40)
    prepared = picture.to(torch.uint8)[None]
    learn = create_transform(DataConfig(image_size=16, channels=1, crop="random"), train=True)
    views = to_uint8(learn.augment([prepared]*n, torch.arange(n)))[:, 0].double()
    mirrored = (views[:, 0, 0] > views[:, 0, -1]).double()
    place = views.amin((1, 2))
    assert len(place.unique()) > 3 and abs(mirrored.mean() - 0.5) < 4*0.5/100
    assert torch.corrcoef(torch.stack([place, mirrored]))[0, 1].abs() < 4/100


def test_to_bytes_is_what_plotting_draws():
    "Images that were drawn, and images that are shown, are the same bytes."
    from diffusion_model.plotting import image_grid
    x = torch.linspace(-1.2, 1.2, 48*48).view(1, 1, 48, 48).expand(1, 3, 48, 48)
    shown = torch.from_numpy(image_grid(x, pad=0)).permute(2, 0, 1)
    assert torch.equal(Pixels(DataConfig()).decode(x)[0], shown)


def test_unknown_background():
    with pytest.raises(ValueError, match="data.background: found 'nocolour'"):
        create_transform(DataConfig(background="nocolour"))
