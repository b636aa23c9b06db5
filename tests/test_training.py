"Runs that are killed, crowded, short of memory or of range: nothing is lost, and the message says what to do."
import hashlib, json, os, signal, subprocess, sys
from pathlib import Path

import pytest
import torch

from diffusion_model.checkpoint import find_checkpoint
from diffusion_model.config import ConfigError, load_config
from diffusion_model.dataset import create_loader
from diffusion_model.tracking import claim, read_status
from diffusion_model.training import Callback, SaveCheckpoints, Trainer

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"base_channels": 8, "norm_groups": 4, "attention_resolutions": "[]", "channel_multipliers": "[1]",
         "num_res_blocks": 1, "image_size": 8, "batch_size": 6, "max_steps": 40, "train_size": 90, "device": "cpu",
         "horizontal_flip": "true", "dropout": 0.1, "progress": "false", "warmup_steps": 5}
WORKER = """
import os, signal, sys
from diffusion_model.config import load_config
from diffusion_model.training import Callback, SaveCheckpoints, Trainer

class Kill(Callback):
    def after_step(self, trainer, metrics):
        if trainer.step == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    trainer = Trainer(load_config("quickstart", sys.argv[3:]), callbacks=[SaveCheckpoints(5), Kill()])
    if sys.argv[2] == "resume": trainer.resume(trainer.run_dir)
    trainer.fit()
"""


def small(folder, **change): return load_config("quickstart", SMALL | {"output_dir": str(folder)} | change)


def work(tmp_path, out, kill_at, how, **change):
    (tmp_path/"worker.py").write_text(WORKER)
    words = [f"--{k}={v}" for k, v in (SMALL | {"output_dir": str(out)} | change).items()]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, tmp_path/"worker.py", str(kill_at), how, *words], cwd=tmp_path, env=env,
                          text=True, capture_output=True, timeout=240)


def hashes(out):
    folder = out/"checkpoints"/"step_00000040"
    return {n: hashlib.sha256((folder/n).read_bytes()).hexdigest()
            for n in ("model.safetensors", "ema.safetensors", "trainer.pt")}


@pytest.mark.parametrize("workers", [0, 2])
def test_forty_steps_are_seventeen_a_kill_and_the_rest(tmp_path, workers):
    "With accumulation, dropout, flips, a warm-up: equal bytes of weights, averages and optimizer."
    options = {"accumulation": 3, "num_workers": workers}
    assert work(tmp_path, tmp_path/"straight", 0, "start", **options).returncode == 0
    assert work(tmp_path, tmp_path/"killed", 17, "start", **options).returncode == -signal.SIGKILL
    assert read_status(tmp_path/"killed")["state"] == "running"  # kill -9 leaves no last words
    assert find_checkpoint(tmp_path/"killed").name == "step_00000015"  # at most one interval is lost
    done = work(tmp_path, tmp_path/"killed", 0, "resume", **options)
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path/"straight") == hashes(tmp_path/"killed")


def test_a_second_run_in_the_same_directory_is_refused(tmp_path):
    with claim(tmp_path, 10) as tell:
        tell("running", 3)
        done = work(tmp_path, tmp_path, 0, "start")
        assert done.returncode and f"in use by process {os.getpid()} on" in done.stderr
        assert "at step 3: wait, stop that process, or choose another place by --output_dir" in done.stderr
        assert not (tmp_path/"checkpoints").exists() and read_status(tmp_path)["step"] == 3
    with claim(tmp_path, 10): pass  # free again


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


def test_no_memory_left(tmp_path, monkeypatch):
    trainer = Trainer(small(tmp_path), callbacks=[SaveCheckpoints(2)])
    loss = Trainer.loss

    def full(self, batch):
        if self.step == 5: raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return loss(self, batch)
    monkeypatch.setattr(Trainer, "loss", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"step 5: .* batch_size 6 in 1 part.*--accumulation 2"): trainer.fit()
    status = read_status(tmp_path)
    assert status["state"] == "failed" and "no memory left" in status["error"]
    assert find_checkpoint(tmp_path).name == "step_00000004"
    monkeypatch.undo()
    again = Trainer(small(tmp_path, accumulation=2), callbacks=[])
    again.resume(tmp_path)
    assert again.fit().step == 40


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
