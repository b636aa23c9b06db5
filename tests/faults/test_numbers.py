"Faults 17 and 18: numbers that explode, and memory that runs out."
import re

import pytest
import torch
from PIL import Image

from diffusion_model.checkpoint import load_checkpoint
from diffusion_model.dataset import create_dataset, sample_indices
from diffusion_model.tracking import read_status
from diffusion_model.transforms import Transform
from diffusion_model.unet import UNet
from runs import At, Log, SaveCheckpoints, Trainer, small, steps, stop, trainer, words


class Faulty(Transform):
    "One pixel of the sample at position 25 is no number."
    value = torch.nan

    def augment(self, images, positions):
        x = super().augment(images, positions)
        x[positions == 25, 0, 3, 3] = self.value
        return x


def tensors(value):
    if isinstance(value, torch.Tensor): return [value]
    values = value if isinstance(value, (list, tuple)) else []
    if isinstance(value, dict): values = value.values()
    return [t for v in values for t in tensors(v)]


def finite(folder):
    checkpoint = load_checkpoint(folder)
    for part in (checkpoint.model, checkpoint.ema, checkpoint.trainer):
        for t in tensors(part): assert t.isfinite().all()
    return checkpoint


@pytest.mark.fault(17)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_pixel_that_is_no_number(tmp_path, monkeypatch, value, parts):
    "Position 25 is in the fifth batch of six: none of it reaches weights, averages or optimizer."
    monkeypatch.setattr(Faulty, "value", value)
    cfg = small(tmp_path, accumulation=parts)
    sets = create_dataset(cfg.data)
    sets.train.transform = Faulty(cfg.data, True)
    run = Trainer(cfg, datasets=sets, callbacks=[Log(1), SaveCheckpoints(2)])
    with pytest.raises(FloatingPointError) as caught: run.fit()
    image = sample_indices(torch.tensor([25]), len(sets.train), cfg.training.seed).item()
    for part in ("step 4: the loss is not finite", "gradient norm nan", "learning rate 0.002",
                 f"samples 25 (image {image})", "the weights are as they were",
                 "Lower training.learning_rate", "look at these images"):
        assert part in str(caught.value)
    assert run.step == 4 and read_status(tmp_path)["state"] == "failed"
    there = finite(tmp_path)
    assert there.step == 4
    for saved, now in ((there.model, run.objective.averaged), (there.ema, run.ema.network)):
        for k, v in now.state_dict().items(): assert torch.equal(saved[k], v)
    now = tensors(run.optimizer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(tensors(there.trainer["optimizer"]), now,
                                                 strict=True))


@pytest.mark.fault(17)
def test_a_learning_rate_far_too_high(tmp_path, command):
    command.train(*words(tmp_path, learning_rate="1e20", warmup_steps=0, lr_schedule="constant",
                         checkpoint_every=1))
    command.says(1, "step ", "not finite", "gradient norm", "learning rate 1e+20", "samples ",
                 "Lower training.learning_rate", "--debug")
    assert finite(tmp_path).step == int(re.search(r"step (\d+):", command.err)[1])


# -- memory

def no_memory(*_): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.fault(18)
def test_no_memory_while_training(tmp_path, monkeypatch, command):
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step",
                        lambda self, batch: no_memory() if self.step == 5 else step(self, batch))
    command.train(*words(tmp_path, checkpoint_every=2))
    command.says(1, "step 5: no memory left on cpu", "batch_size 6 in 1 part", "--accumulation 2",
                 "--precision bf16", "--resume", "checkpoints are kept")
    assert steps(tmp_path) == [2, 4] and read_status(tmp_path)["state"] == "failed"
    monkeypatch.undo()
    command.train("--resume", tmp_path, "--accumulation", "2", "--max_steps", "8")
    assert command.code == 0 and "resumed at step 4" in command.out and steps(tmp_path)[-1] == 8


@pytest.mark.fault(18)
def test_sampling_halves_its_batch_and_goes_on(tmp_path, monkeypatch, command):
    "Ten images at once do not fit, three do: the images are the same."
    trainer(tmp_path/"run", At(5, stop)).fit()
    sample = lambda out: command.sample("--checkpoint", tmp_path/"run", "--num_samples", "10",
                                        "--output_dir", tmp_path/out, "--guidance_scale", "1")
    assert sample("whole").code == 0, command.err
    forward, sizes = UNet.forward, []

    def small_memory(self, x, *args, **kw):
        sizes.append(len(x))
        if len(x) > 3: no_memory()
        return forward(self, x, *args, **kw)
    monkeypatch.setattr(UNet, "forward", small_memory)
    sample("halved").says(0, "no memory left to sample 10 images at once", "going on with 5",
                          "going on with 2", "sampling.sample_batch_size")
    assert sizes[:3] == [10, 5, 2] and max(sizes[3:]) <= 3
    names = sorted(p.name for p in (tmp_path/"whole").iterdir())
    assert len(names) == 11 and names == sorted(p.name for p in (tmp_path/"halved").iterdir())
    for name in names[:-1]:
        a, b = (torch.tensor(list(Image.open(tmp_path/out/name).convert("RGB").tobytes()))
                for out in ("whole", "halved"))
        assert (a - b).abs().max() <= 1  # rounding


@pytest.mark.fault(18)
def test_not_even_one_image_fits(tmp_path, monkeypatch, command):
    trainer(tmp_path/"run", At(5, stop)).fit()
    monkeypatch.setattr(UNet, "forward", no_memory)
    command.sample("--checkpoint", tmp_path/"run", "--num_samples", "10", "--output_dir",
                   tmp_path/"out")
    command.says(1, "no memory left to sample even one image", "--device cpu", "smaller network")
