"Killed while an autoencoder learns, while latents are written, while a model learns in them."
import json

import pytest
from runs import python

KILLER = """
import json, os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)  # a fork has no threads
from diffusion_model import latents
from diffusion_model.checkpoint import find_checkpoint, wait_for_checkpoints
from runs import At, autoencoder_config, hashes, latent_config, run_of
root = Path(sys.argv[1])
os.environ["DIFFUSION_MODEL_CACHE"] = str(root/"cache")
usual = latents._rows

def die(*_): os.kill(os.getpid(), signal.SIGKILL)

def start(cfg, *callbacks, die_at_batch=None):
    "A process that begins, or goes on; how it ended."
    if child := os.fork(): return os.waitpid(child, 0)[1]
    calls = []
    def rows(*given):
        calls.append(1)
        if len(calls) == die_at_batch: die()
        return usual(*given)
    latents._rows = rows
    run, folder = run_of(cfg, *callbacks), Path(cfg.logging.output_dir)
    if (folder/"checkpoints").exists(): run.resume(folder)
    run.fit()
    wait_for_checkpoints()
    (root/"encoded").write_text(str(len(calls)))
    os._exit(0)

def two(name, make, step):
    "An unbroken run, and one that is killed and goes on."
    assert start(make(root/f"{name}_whole")) == 0
    assert start(make(root/f"{name}_killed"), At(step, die)) == signal.SIGKILL
    assert start(make(root/f"{name}_killed")) == 0
    return [hashes(root/f"{name}_{end}") for end in ("whole", "killed")]

found = {"autoencoder": two("autoencoder", autoencoder_config, 13)}
one = root/"autoencoder_whole"
cfg = latent_config(root/"first", one, latent_sample="true")
assert start(cfg, die_at_batch=2) == signal.SIGKILL  # in the second of two batches
cache = root/"cache"/"latents"
found["left"] = [p.suffix for p in cache.iterdir() if p.is_dir()]
assert start(cfg) == 0
found["then"] = [p.suffix for p in cache.iterdir() if p.is_dir()]
kept = next(p for p in cache.iterdir() if p.is_dir())
found["bytes"] = [(kept/"latents.npy").read_bytes().hex()[:2000]]
(kept/"manifest.json").unlink()
found["model"] = two("model", lambda out: latent_config(out, one, latent_sample="true"), 13)
found["bytes"].append((kept/"latents.npy").read_bytes().hex()[:2000])
found["encoded_at_the_end"] = (root/"encoded").read_text()
print(json.dumps(found))
"""


@pytest.mark.fault(3)
def test_killed_in_each_stage(tmp_path):
    done = python(tmp_path, KILLER, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("autoencoder", "model"):
        assert found[name][0] == found[name][1] and found[name][0][0] == "step_00000020"
    assert found["left"] == [".part"] and found["then"] == [""]  # half a folder is never used
    assert found["bytes"][0] == found["bytes"][1] and found["encoded_at_the_end"] == "0"


AT_ONCE = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from diffusion_model import latents
from diffusion_model.dataset import create_dataset
from diffusion_model.space import create_space
from runs import autoencoder_config, latent_config, run_of
from diffusion_model.checkpoint import wait_for_checkpoints
root = Path(sys.argv[1])
os.environ["DIFFUSION_MODEL_CACHE"] = str(root/"cache")
run_of(autoencoder_config(root/"one", max_steps=10)).fit()
wait_for_checkpoints()
data = latent_config(root/"out", root/"one").data
usual = latents.encode_all
ready, go = os.pipe()
children = []
for name in ("a", "b"):
    if child := os.fork(): children.append(child); continue
    def counted(*given):
        with open(root/"encoded", "a") as file: file.write(name)
        usual(*given)
    latents.encode_all = counted
    space, images = create_space(data), create_dataset(data).train
    os.read(ready, 1)
    found = space.prepared(images)
    (root/name).write_bytes(found.batch(torch.arange(90)).images.numpy().tobytes())
    os._exit(0)
os.write(go, b"..")
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
same = (root/"a").read_bytes() == (root/"b").read_bytes()
print(json.dumps([(root/"encoded").read_text(), same]))
"""


@pytest.mark.fault(25)
def test_two_runs_that_want_the_same_latents_at_once(tmp_path):
    done = python(tmp_path, AT_ONCE, tmp_path)
    assert done.returncode == 0, done.stderr
    encoded, same = json.loads(done.stdout.splitlines()[-1])
    assert len(encoded) == 1 and same
