"Edges of the transforms: modes, sizes, exactness, independence of batches."
import numpy as np
import pytest
import torch
from PIL import Image
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
    assert torch.equal(to_tensor(Image.fromarray(x), 1).flatten(), EVERY)


def test_floating_point_images_are_refused():
    with pytest.raises(ValueError, match="mode F"):
        to_tensor(Image.fromarray(np.zeros((4, 4), np.float32)))


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
