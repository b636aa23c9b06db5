"The objective of an autoencoder."
import math
import sys
from pathlib import Path

import pytest
import torch

from diffusion_model.dataset import create_dataset
from diffusion_model.features import create_features
from diffusion_model.objective import create_objective
from diffusion_model.processes import World
from diffusion_model.pixels import psnr
from diffusion_model.reconstruction import Maps, perceptual_distance
from diffusion_model.tracking import read_metrics

sys.path.insert(0, str(Path(__file__).parent/"faults"))
from runs import autoencoder_config, run_of


def objective(tmp_path, **change):
    cfg = autoencoder_config(tmp_path, **change)
    torch.manual_seed(0)
    return create_objective(cfg, create_dataset(cfg.data))


def test_psnr():
    a = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    assert torch.allclose(psnr(a + 2, a), torch.tensor(20*math.log10(255/2)).double())
    assert psnr(a, a).isinf().all()


@pytest.mark.parametrize("error", ["l1", "l2"])
def test_the_loss_is_what_the_config_weighs(tmp_path, error):
    learner = objective(tmp_path, error=error, kl_weight=0.5)
    batch = learner.datasets.train.batch(torch.arange(6))
    terms = learner.terms(batch.images, *learner.reconstruct(batch.images))
    back, latents = learner.reconstruct(batch.images)
    apart = back - batch.images
    mean = (apart.abs() if error == "l1" else apart.square()).mean((1, 2, 3))
    wanted = mean + 0.5*latents.kl()/192
    assert torch.allclose(learner.weighed(terms), wanted, atol=1e-6)
    assert not torch.allclose(learner.loss(batch), wanted, atol=1e-4)  # by samples, not means


def test_the_judge_sees_bytes_whatever_the_normalisation(tmp_path):
    there = {}
    for mean, std in ((0.5, 0.5), (0.3, 0.2)):
        learner = objective(tmp_path, perceptual="shapes-a", mean=mean, std=std)
        x = learner.datasets.train.batch(torch.arange(4)).images
        same = learner.terms(x, x, learner.network.encode(x))
        assert same["perceptual"].abs().max() < 1e-5
        flipped = learner.terms(x, x.flip(2), learner.network.encode(x))
        there[mean] = flipped["perceptual"]
    assert torch.allclose(there[0.5], there[0.3], atol=1e-3)


def test_the_gradient_reaches_the_picture_and_not_the_judge():
    maps = Maps(create_features("shapes-a"))
    a = (torch.rand(2, 3, 32, 32)*255).requires_grad_()
    perceptual_distance(maps, a, torch.rand(2, 3, 32, 32)*255).sum().backward()
    assert a.grad.abs().sum() > 0
    assert all(p.grad is None for p in maps.features.parts.parameters())


def test_a_run_reports_and_shows(tmp_path):
    run = run_of(autoencoder_config(tmp_path, max_steps=5)).fit()
    with run.averaged() as learner:
        found = learner.validate(run.datasets.validation, World("cpu"))
        pictures, film = learner.draw(3)
    assert set(found) == {"validation_loss", "psnr", "kl", "latent_std"}
    assert all(math.isfinite(v) for v in found.values()) and film == []
    assert pictures.shape == (3, 3, 8, 8) and pictures.dtype == torch.uint8
    assert len([row for row in read_metrics(tmp_path) if "loss" in row]) == 5
