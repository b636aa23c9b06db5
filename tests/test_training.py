"The loop's own promises: where a run stands, parts of a batch, half precision."
import os

import pytest
import torch

from diffusion_model.config import ConfigError, load_config
from diffusion_model.dataset import create_loader
from diffusion_model.tracking import read_status
from diffusion_model.training import Callback, Trainer

SMALL = {"base_channels": 8, "norm_groups": 4, "attention_resolutions": "[]", "channel_multipliers": "[1]",
         "num_res_blocks": 1, "image_size": 8, "batch_size": 6, "max_steps": 40, "train_size": 90, "device": "cpu",
         "horizontal_flip": "true", "dropout": 0.1, "progress": "false", "warmup_steps": 5}


def small(folder, **change): return load_config("quickstart", SMALL | {"output_dir": str(folder)} | change)


def test_status(tmp_path):
    class Stop(Callback):
        def after_step(self, trainer, metrics):
            assert read_status(trainer.run_dir)["state"] == "running"
            trainer.stop = trainer.step == 2
    Trainer(small(tmp_path/"a"), callbacks=[Stop()]).fit()
    assert {"state": "stopped", "step": 2, "max_steps": 40, "pid": os.getpid()}.items() <= read_status(
        tmp_path/"a").items()
    Trainer(small(tmp_path/"b", max_steps=1), callbacks=[]).fit()
    assert read_status(tmp_path/"b")["state"] == "finished"
    assert read_status(tmp_path/"nowhere") == {}
    (tmp_path/"b"/"status.json").write_text('{"half')
    assert read_status(tmp_path/"b") == {}


@pytest.mark.parametrize("parts", [2, 3, 4, 6])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, parts):
    def gradient(accumulation):
        trainer = Trainer(small(tmp_path, accumulation=accumulation, dropout=0, max_grad_norm=0), callbacks=[])
        told = trainer.train_step(create_loader(trainer.datasets.train, 6, seed=0).at(0))
        return torch.cat([p.grad.flatten() for p in trainer.network.parameters()]), told
    (whole, told), (sum_, told_of_parts) = gradient(1), gradient(parts)
    torch.testing.assert_close(sum_, whole, rtol=1e-4, atol=1e-6)
    assert told_of_parts["loss"] == pytest.approx(told["loss"], rel=1e-5)


def test_more_parts_than_images(tmp_path):
    with pytest.raises(ConfigError, match="training.accumulation: found 7; at most training.batch_size = 6"):
        small(tmp_path, accumulation=7)


def test_fp16_halves_a_scale_that_is_too_large_and_keeps_it(tmp_path):
    trainer = Trainer(small(tmp_path, precision="fp16"), callbacks=[])
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.**40)
    batch = create_loader(trainer.datasets.train, 6, seed=0).at(0)
    before = [p.clone() for p in trainer.network.parameters()]
    told = trainer.train_step(batch)
    scale = trainer.scaler.get_scale()
    assert scale < 2.**40 and trainer.step == 1 and told["grad_norm"] < 1e4
    assert all(p.isfinite().all() for p in trainer.network.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.network.parameters()))
    trainer.save()
    again = Trainer(small(tmp_path, precision="fp16"), callbacks=[])
    again.resume(tmp_path)
    assert again.scaler.get_scale() == scale


def test_nan_in_fp16_is_an_error_not_a_loop(tmp_path):
    trainer = Trainer(small(tmp_path, precision="fp16"), callbacks=[])
    batch = create_loader(trainer.datasets.train, 6, seed=0).at(0)
    batch.images[2] = torch.nan
    before = [p.clone() for p in trainer.network.parameters()]
    with pytest.raises(FloatingPointError, match=r"step 0: the loss is not finite .*samples 2 \(image \d+\)"): trainer.train_step(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.network.parameters()))
