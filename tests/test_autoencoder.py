"The autoencoder: its shapes, what it refuses, its divergence, its scale, and what it saves."
import copy, io, itertools

import pytest
import torch
from torch import nn

from diffusion_model.autoencoder import Normal, create_autoencoder
from diffusion_model.autoencoder_config import AutoencoderConfig

SMALL = dict(latent_channels=3, base_channels=8, channel_multipliers=[1, 2], num_res_blocks=1,
             norm_groups=4)


def awake(network):
    "Nothing is zero by chance, so that every part is seen."
    torch.manual_seed(0)
    with torch.no_grad():
        for p in network.parameters(): p.add_(0.1*torch.randn_like(p))
    return network


def small(shape=(3, 8, 12), **fields):
    return awake(create_autoencoder(AutoencoderConfig(**SMALL | fields), shape))


@pytest.mark.parametrize("levels, patch, channels, attention, convs", list(itertools.product(
    ([1], [1, 2], [1, 2, 1]), (1, 2), (1, 4), (True, False), (True, False))))
def test_shapes_there_and_back(levels, patch, channels, attention, convs):
    network = small((channels, 16, 24), channel_multipliers=levels, patch_size=patch,
                    attention=attention, latent_convs=convs)
    x, factor = torch.randn(2, channels, 16, 24), patch*2**(len(levels) - 1)
    latents = network.encode(x)
    assert network.config.factor == factor
    assert latents.mean.shape == latents.logvar.shape == (2, 3, 16//factor, 24//factor)
    assert network.config.latent_shape(x.shape[1:]) == latents.mean.shape[1:]
    assert network.decode(latents.mean).shape == x.shape
    assert torch.equal(network(x), network.decode(latents.mean))


@pytest.mark.parametrize("norm", ["group", "layer", "rms", "instance", "batch"])
def test_gradient_reaches_every_parameter(norm):
    network, x = small(norm=norm, latent_convs=True), torch.randn(2, 3, 8, 12)
    latents = network.encode(x)
    back = network.decode(latents.sample(torch.randn_like(latents.mean)))
    ((back - x).square().mean() + latents.kl().mean()).backward()
    still = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # what is added before a norm over one channel, or the same for all words of a softmax, is lost
    assert not [n for n in still if not n.endswith(("conv1.bias", "to_k.bias"))], still
    assert torch.stack([p.grad.isfinite().all() for p in network.parameters()]).all()


def test_divergence_against_torch():
    torch.manual_seed(0)
    p = Normal(torch.randn(7, 2, 3, 3).double(), torch.randn(7, 2, 3, 3).double())
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(p.mean, (p.logvar/2).exp()),
        torch.distributions.Normal(torch.zeros_like(p.mean), torch.ones_like(p.mean)))
    assert torch.allclose(p.kl(), theirs.flatten(1).sum(1), atol=1e-10)


def test_sample_is_a_shift_and_a_scale():
    mean, logvar, noise = torch.randn(3, 4, 5).double()
    theirs = torch.distributions.Normal(mean, (logvar/2).exp()).icdf(
        torch.distributions.Normal(0., 1.).cdf(noise))
    assert torch.allclose(Normal(mean, logvar).sample(noise), theirs, atol=1e-8)


def test_checkpointing_changes_no_gradient():
    plain, x = small(attention=True), torch.randn(2, 3, 8, 12)
    again = create_autoencoder(plain.config.model_copy(update={"gradient_checkpointing": True}),
                               (3, 8, 12))
    again.load_state_dict(plain.state_dict())
    seen = []
    again.encoder.middle.register_forward_pre_hook(lambda *_: seen.append(1))
    for network in (plain, again): network(x).square().mean().backward()
    assert len(seen) == 2  # once on the way there, once again for the gradient
    for p, q in zip(plain.parameters(), again.parameters()):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None: assert torch.allclose(p.grad, q.grad, atol=1e-6)


def test_watching_is_exact_and_forgets():
    network, parts = small(), [i + (1 + i)*torch.randn(16, 5).double() for i in range(9)]
    for part in parts: network.watch(part)
    every = torch.cat(parts)
    assert torch.allclose(network.latent_mean.double(), every.mean(), atol=1e-5)
    assert torch.allclose(network.latent_var.double(), every.var(correction=0), rtol=1e-5)
    for _ in range(60): network.watch(torch.tensor([2., 4.]), memory=3)
    assert torch.allclose(network.latent_mean, torch.tensor(3.), atol=1e-4)
    assert torch.allclose(network.latent_var, torch.tensor(1.), atol=1e-3)
    assert not network.latent_mean.requires_grad


def test_scaled_and_back():
    network, z = small(), 3 + 5*torch.randn(64, 3, 4, 4)
    assert torch.equal(network.scaled(z), z)  # nothing watched: as it is
    network.watch(z)
    y = network.scaled(z)
    assert y.mean().abs() < 1e-5 and abs(y.std(correction=0) - 1) < 1e-5
    assert torch.allclose(network.unscaled(y), z, atol=1e-5)


def test_state_goes_round():
    network = small(latent_convs=True)
    network.watch(torch.randn(8, 3, 2, 2)*4 + 1)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    other = create_autoencoder(copy.deepcopy(network.config), (3, 8, 12))
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    x = torch.randn(1, 3, 8, 12)
    assert torch.equal(network(x), other(x))
    assert torch.equal(network.scaled(network.encode(x).mean), other.scaled(other.encode(x).mean))
    assert other.latents_seen == 1


def test_limits_keep_numbers_finite():
    network, x = small(), torch.randn(1, 3, 8, 12)
    nn.init.constant_(network.encoder.conv_out.bias, 1000.)
    latents = network.encode(x)
    assert latents.kl().isfinite() and latents.logvar.max() == 20
    nn.init.constant_(network.encoder.conv_out.bias, -1000.)
    assert network.encode(x).logvar.min() == -30


@pytest.mark.parametrize("shape, says", [
    ((2, 1, 8, 8), "takes (batch, 3, height, width)"), ((3, 8, 8), "takes (batch, 3"),
    ((2, 3, 8, 9), "found width 9; the autoencoder shrinks images 2 times"),
    ((2, 3, 7, 8), "choose 6 or 8, or fewer levels"), ((2, 3, 7, 7), "found 7; the autoencoder")])
def test_images_that_do_not_fit(shape, says):
    with pytest.raises(ValueError) as error: small().encode(torch.zeros(shape))
    assert says in str(error.value)


@pytest.mark.parametrize("shape", [(2, 4, 4, 6), (3, 4, 6)])
def test_latents_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="this autoencoder takes .batch, 3, height, width"):
        small().decode(torch.zeros(shape))
