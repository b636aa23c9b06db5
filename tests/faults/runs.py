"Tiny runs to break (8×8 images, two thousand weights): in this process, by command, or in others."
import hashlib, os, subprocess, sys
from pathlib import Path

from diffusion_model.callbacks import Callback, Log, SaveCheckpoints
from diffusion_model.checkpoint import find_checkpoint, wait_for_checkpoints
from diffusion_model.config import load_config
from diffusion_model.tracking import read_metrics
from diffusion_model.training import Trainer

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = {"base_channels": 8, "norm_groups": 4, "attention_resolutions": "[]",
         "channel_multipliers": "[1]", "num_res_blocks": 1, "image_size": 8, "batch_size": 6,
         "max_steps": 40, "train_size": 90, "validation_size": 6, "test_size": 6, "device": "cpu",
         "horizontal_flip": "true", "dropout": 0.1, "warmup_steps": 5, "checkpoint_every": 5,
         "log_every": 1, "num_samples": 4, "steps": 2, "progress": "false",
         "optimizer": "adamw", "learning_rate": 2e-3}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
                            "PYTHONWARNINGS": "default"}


def words(folder, **change):
    "A tiny run as the command line has it."
    fields = SMALL | {"output_dir": folder} | change
    return ["--config", "quickstart"] + [f"--{k}={v}" for k, v in fields.items()]


def small(folder, **change): return load_config("quickstart", words(folder, **change)[2:])


class At(Callback):
    "Do something once a step is made."
    def __init__(self, step, do): self.step, self.do = step, do

    def after_step(self, trainer, metrics):
        if trainer.step == self.step: self.do(trainer)


def stop(trainer): trainer.stop = True


def trainer(folder, *callbacks, **change):
    "Tells each step, and saves every five."
    return Trainer(small(folder, **change), callbacks=[Log(1), SaveCheckpoints(5), *callbacks])


def resumed(folder, *callbacks, **change):
    again = trainer(folder, *callbacks, **change)
    again.resume(folder)
    return again


def hashes(folder):
    "sha256 of the newest checkpoint's weights, averages, and optimizer state."
    wait_for_checkpoints()
    newest = find_checkpoint(folder)
    return [newest.name] + [hashlib.sha256((newest/name).read_bytes()).hexdigest()
                            for name in ("model.safetensors", "ema.safetensors", "trainer.pt")]


def told(folder):
    "Step, loss and learning rate of each line."
    return [(row["step"], row["loss"], row["lr"]) for row in read_metrics(folder) if "loss" in row]


def steps(folder):
    "The steps of which there is a checkpoint, and nothing else beside them."
    wait_for_checkpoints()
    return sorted(int(p.name.removeprefix("step_")) for p in (folder/"checkpoints").iterdir())


def python(folder, code, *arguments, **environment):
    "A script in a process of its own."
    script = Path(folder)/"script.py"
    script.write_text(code)
    return subprocess.run([sys.executable, script, *map(str, arguments)],
                          env=ENVIRONMENT | environment, cwd=folder, text=True, capture_output=True,
                          timeout=240)


# -- an autoencoder, and a model in its latents: 8×8×3 pixels become 4×4×4 numbers

LITTLE = {"base_channels": 8, "norm_groups": 4, "channel_multipliers": "[1]", "num_res_blocks": 1,
          "image_size": 8, "batch_size": 6, "max_steps": 20, "train_size": 90,
          "validation_size": 6, "test_size": 6, "device": "cpu", "horizontal_flip": "true",
          "warmup_steps": 5, "checkpoint_every": 5, "log_every": 1, "progress": "false"}


def autoencoder_config(folder, **change):
    return load_config("autoencoder", LITTLE | {"patch_size": 2, "output_dir": str(folder)}
                       | change)


def latent_words(folder, autoencoder, **change):
    "A tiny run in the latents of `autoencoder`, as the command line has it."
    fields = LITTLE | {"attention_resolutions": "[]", "dropout": 0.1, "num_samples": 4, "steps": 2,
                       "output_dir": str(folder), "autoencoder": str(autoencoder)} | change
    return ["--config", "latent"] + [f"--{k}={v}" for k, v in fields.items()]


def latent_config(folder, autoencoder, **change):
    return load_config("latent", latent_words(folder, autoencoder, **change)[2:])


def run_of(cfg, *callbacks): return Trainer(cfg, callbacks=[Log(1), SaveCheckpoints(5), *callbacks])
