"Checkpoints under fault: kills, full disks, damage, malice, wrong paths and wrong networks."
import errno, hashlib, io, json, os, random, shutil, signal, subprocess, sys
import textwrap, time, warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import diffusion_model.checkpoint as module
from diffusion_model.checkpoint import (Checkpoint, CheckpointError, find_checkpoint,
                                        list_checkpoints, load_checkpoint, load_network,
                                        load_weights, prune_checkpoints, save_checkpoint)
from diffusion_model.config import config_diff, load_config
from diffusion_model.ema import EMA
from diffusion_model.optimizer import create_optimizer
from diffusion_model.unet import create_unet

FILES = ["model.safetensors", "ema.safetensors", "trainer.pt", "config.yaml", "manifest.json"]
TINY = {"model.base_channels": 8, "model.norm_groups": 4, "model.channel_multipliers": "1",
        "model.num_res_blocks": 1, "model.attention_resolutions": "[]", "data.image_size": 8}


class Run:
    "A tiny run that can save itself."
    def __init__(self, root, **fields):
        self.root, self.config = Path(root)/"run", load_config("default", {**TINY, **fields})
        torch.manual_seed(0)
        self.network = create_unet(self.config)
        self.ema = EMA(self.network)
        self.optimizer = create_optimizer(self.config.training, self.network)
        self.network(torch.randn(1, 3, 8, 8), torch.zeros(1)).sum().backward()
        self.optimizer.step()
        self.ema.update(0)

    def save(self, step, **kwargs):
        return save_checkpoint(self.root, step, self.network, self.ema, self.optimizer, self.config,
                               **kwargs)

    def names(self): return sorted(os.listdir(self.root/"checkpoints"))


@pytest.fixture
def run(tmp_path): return Run(tmp_path)


def flip(path, place=-1, bit=1):
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


# -- what goes in comes out

def test_round_trip(run):
    extra = {"seen": 7, "note": "x", "list": [1, (2., None)], "tensor": torch.arange(3)}
    path = run.save(12, extra=extra, classes=("a", "b"))
    assert path == run.root/"checkpoints"/"step_00000012"
    assert sorted(os.listdir(path)) == sorted(FILES)
    found = load_checkpoint(run.root)
    assert (found.step, found.classes, found.path) == (12, ["a", "b"], path)
    assert found.config == run.config
    for state, network in ((found.model, run.network), (found.ema, run.ema.network)):
        want = network.state_dict()
        assert state.keys() == want.keys() and all(torch.equal(state[k], want[k]) for k in want)
    trainer = found.trainer
    assert trainer["seen"] == 7 and trainer["list"] == [1, (2., None)]
    assert torch.equal(trainer["tensor"], torch.arange(3))
    moments = trainer["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moments, run.optimizer.state_dict()["state"][0]["exp_avg"])


def test_without_ema_optimizer_or_classes(run):
    save_checkpoint(run.root, 0, run.network.state_dict(), None, None, run.config)
    found = load_checkpoint(run.root)
    assert (found.step, found.ema, found.classes) == (0, None, None)
    assert found.trainer == {"optimizer": None}
    network, config = load_network(run.root)
    assert torch.equal(network.conv_in.weight, run.network.conv_in.weight) and not network.training


@pytest.mark.parametrize("ema", [True, False])
def test_load_network(run, ema):
    run.save(1)
    network, config = load_network(run.root, ema=ema)
    want = (run.ema.network if ema else run.network).state_dict()
    assert config == run.config and not network.training
    for k, v in network.state_dict().items(): assert torch.equal(v, want[k])
    again, _ = load_network(load_checkpoint(run.root), ema=ema)
    assert torch.equal(again.conv_in.weight, network.conv_in.weight)


def test_parts_are_read_only_when_asked_for(run):
    path = run.save(1)
    found = load_checkpoint(run.root)
    (path/"trainer.pt").unlink()                   # nobody who samples misses it any more
    assert found.ema is not None and found.config == run.config


def test_odd_tensors(tmp_path, run):
    "Not contiguous, channels last, scalars, integers, half precision, tied."
    w = torch.randn(4, 3, 3, 3)
    state = {"turned": torch.randn(3, 5).t(), "last": w.to(memory_format=torch.channels_last),
             "n": torch.tensor(3), "half": torch.randn(3).bfloat16(), "w": w, "view": w[:2],
             "tied": w, "empty": torch.zeros(0)}
    save_checkpoint(tmp_path, 1, state, None, None, run.config)
    found = load_checkpoint(tmp_path).model
    assert found.keys() == state.keys()
    for k in state: assert torch.equal(found[k], state[k]), k


def test_numpy_numbers_become_plain_and_strangers_are_named(run):
    run.save(1, extra={"loss": np.float64(0.5), "od": OrderedDict(a=1)})
    trainer = load_checkpoint(run.root).trainer
    assert type(trainer["loss"]) is float and trainer["od"] == {"a": 1}
    for stranger in (np.arange(3), {1, 2}, Path("x"), lambda: 0):
        with pytest.raises(TypeError, match=r"trainer\['bad'\]\[1\] is a "):
            run.save(2, extra={"bad": [0, stranger]})
    assert run.names() == ["step_00000001"]


# -- faults 3, 6, 7: kills, $TMPDIR, keep-last-1

SAVER = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import diffusion_model.checkpoint as module
    from test_checkpoint import Run
    write, replace, rmtree = module._write, module.Path.replace, module.shutil.rmtree
    module.torch.set_num_threads(1)                   # a fork has no threads

    def die(): os.kill(os.getpid(), signal.SIGKILL)
    def dying_write(path, data):
        if path.name != moment: return write(path, data)
        path.write_bytes(bytes(data)[:len(data)//2])
        die()
    def dying_replace(self, target):
        if moment == "before rename": die()
        done = replace(self, target)
        if moment == "after rename": die()
        return done
    def dying_rmtree(path, **kwargs):
        if moment != "deleting": return rmtree(path, **kwargs)
        os.unlink(os.path.join(path, "trainer.pt"))
        die()

    def save_for_ever(run):
        module._write, module.Path.replace = dying_write, dying_replace
        module.shutil.rmtree, step = dying_rmtree, 2
        while True:
            run.save(step, keep=1)
            step += 1

    for moment in sys.argv[1:]:
        run = Run(Path({root!r})/moment)
        run.save(1)
        print("ready", flush=True)
        if moment == "never": save_for_ever(run)
        if (child := os.fork()) == 0: save_for_ever(run)
        print(os.waitpid(child, 0)[1], flush=True)
""")
MOMENTS = [*FILES, "before rename", "after rename", "deleting"]


def saver(tmp_path, *moments):
    script = tmp_path/"saver.py"
    script.write_text(SAVER.format(tests=str(Path(__file__).parent), root=str(tmp_path)))
    env = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": "/nowhere/at/all"}
    return subprocess.Popen([sys.executable, str(script), *moments], env=env, text=True,
                            stdout=subprocess.PIPE)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "What a process leaves that was killed by the system at each moment of its second save."
    root = tmp_path_factory.mktemp("killed")
    lines = saver(root, *MOMENTS).communicate(timeout=60)[0].split()
    assert lines == ["ready", str(int(signal.SIGKILL))]*len(MOMENTS)
    return root


@pytest.mark.fault(3)
@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_between_and_inside_files(killed, moment):
    found = load_checkpoint(killed/moment/"run")
    assert found.step == (2 if moment in ("after rename", "deleting") else 1)
    assert found.trainer["optimizer"]["state"]
    run = Run(killed/moment)
    if moment in FILES: assert run.names() == ["step_00000001", "step_00000002.tmp"]
    run.save(3, keep=1)
    assert run.names() == ["step_00000003"]


@pytest.mark.fault(3)
def test_kill_at_random_moments(tmp_path):
    "One process that saves as fast as it can, killed twenty times at no special moment."
    process, seen = saver(tmp_path, "never"), 0
    process.stdout.readline()
    for _ in range(20):
        time.sleep(random.uniform(0.002, 0.03))
        process.send_signal(signal.SIGSTOP)            # as dead as it gets, and can be asked again
        with warnings.catch_warnings():
            warnings.simplefilter("error")             # nothing may even look damaged
            step = load_checkpoint(tmp_path/"never"/"run").step
        assert step >= seen
        seen = step
        process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    load_checkpoint(tmp_path/"never"/"run")
    assert seen > 1


@pytest.mark.fault(7)
@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt(), OSError(errno.EIO, "")])
def test_a_failing_writer_leaves_the_old_one(run, monkeypatch, error):
    run.save(1)
    def fail(*_): raise error
    monkeypatch.setattr(module, "save_config", fail)
    with pytest.raises(type(error)): run.save(2, keep=1)
    assert run.names() == ["step_00000001"] and load_checkpoint(run.root).step == 1


def test_a_step_saved_again_replaces_the_old_one(run):
    run.save(1, classes=["old"])
    run.save(1, classes=["new"])
    assert run.names() == ["step_00000001"] and load_checkpoint(run.root).classes == ["new"]


@pytest.mark.parametrize("moment", [0, 1])
def test_killed_while_a_step_is_replaced(run, monkeypatch, moment):
    "Between the two renames only `.old` has the step; after them both do."
    run.save(1, classes=["old"])
    real, calls = Path.replace, []
    def replace(self, target):
        if len(calls) > moment: raise SystemExit
        calls.append(1)
        return real(self, target)
    monkeypatch.setattr(module.Path, "replace", replace)
    with pytest.raises(SystemExit): run.save(1, classes=["new"])
    monkeypatch.undo()
    assert load_checkpoint(run.root).classes == [["old"], ["new"]][moment]
    run.save(2)
    assert load_checkpoint(run.root/"checkpoints"/run.names()[0]).step == 1
    run.save(3, keep=1)
    assert run.names() == ["step_00000003"]


# -- fault 5: the disk is full

@pytest.mark.fault(5)
def test_too_little_room_is_seen_before_writing(run, monkeypatch):
    run.save(1)
    usage = shutil.disk_usage(run.root)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError) as caught: run.save(2, keep=1)
    text = str(caught.value)
    for part in ("step 2", "needs 0.", " MB", "0.0 MB free at", str(run.root), "last good: step 1"):
        assert part in text, (part, text)
    assert caught.value.errno == errno.ENOSPC
    assert run.names() == ["step_00000001"]


@pytest.mark.fault(5)
def test_the_disk_fills_up_while_writing(run, monkeypatch):
    def full(path, data):
        if path.name == "trainer.pt": raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)
    write = module._write
    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(OSError, match="No space left on device.*last good: none"): run.save(1)
    assert run.names() == []


# -- faults 8 and 9: damage

@pytest.mark.fault(8)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["cut", "empty", "flipped", "longer", "missing"])
def test_damage_is_found_and_named(run, name, kind):
    run.save(1)
    path = run.save(2)/name
    size = path.stat().st_size
    if kind == "cut": os.truncate(path, size//2)
    elif kind == "empty": os.truncate(path, 0)
    elif kind == "flipped": flip(path, random.randrange(size), 1 << random.randrange(8))
    elif kind == "longer": path.write_bytes(path.read_bytes() + b"\0")
    else: path.unlink()
    with pytest.raises(CheckpointError) as caught: load_checkpoint(path.parent)  # asked for: error
    assert name in str(caught.value)
    if kind in ("cut", "empty"): assert f"{path.stat().st_size:,} bytes" in str(caught.value)
    with pytest.warns(UserWarning, match=f"{name}.*falling back to step_00000001"):
        assert load_checkpoint(run.root).step == 1                               # a run: goes back


@pytest.mark.fault(9)
def test_all_damaged_is_an_error_with_every_reason(run):
    for step in (1, 2): flip(run.save(step)/"model.safetensors")
    with pytest.raises(CheckpointError, match="(?s)no valid.*step_00000002.*step_00000001"):
        find_checkpoint(run.root)


def test_unverified_loading_checks_sizes_only(run):
    path = run.save(1)
    flip(path/"model.safetensors")
    assert load_checkpoint(path, verify=False).model
    os.truncate(path/"model.safetensors", 10)
    with pytest.raises(CheckpointError, match="cut short"): load_checkpoint(path, verify=False)


def test_unverified_garbage_is_still_a_clear_error(run):
    path = run.save(1)
    for name, part in (("model.safetensors", "model"), ("trainer.pt", "trainer")):
        (path/name).write_bytes(b"\xff"*(path/name).stat().st_size)
        with pytest.raises(CheckpointError, match=name):
            getattr(load_checkpoint(path, verify=False), part)


def reseal(path, **changes):
    manifest = json.loads((path/"manifest.json").read_text())
    manifest.pop("sha256")
    (path/"manifest.json").write_bytes(module._seal({**manifest, **changes}))


def test_a_later_format_is_refused_by_name(run):
    path = run.save(1)
    reseal(path, format=99, version="9.9")
    with pytest.raises(CheckpointError, match="format 99.*9.9: upgrade"): load_checkpoint(path)


@pytest.mark.fault(22)
@pytest.mark.parametrize("files", [
    {}, {"../../secret": {"bytes": 1, "sha256": ""}}, {"/etc/passwd": {"bytes": 1, "sha256": ""}}])
def test_a_manifest_must_name_the_needed_files_and_no_others(run, files):
    path = run.save(1)
    manifest = json.loads((path/"manifest.json").read_text())
    reseal(path, files={**manifest["files"], **files} if files else {})
    with pytest.raises(CheckpointError, match="manifest.json"): load_checkpoint(path)


# -- fault 10: malice

class Stranger:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)


@pytest.mark.fault(10)
def test_a_malicious_pickle_is_refused_unrun(run, tmp_path):
    path, mark = run.save(1), tmp_path/"was_here"
    torch.save({"optimizer": Stranger(str(mark))}, path/"trainer.pt")
    data = (path/"trainer.pt").read_bytes()
    files = json.loads((path/"manifest.json").read_text())["files"]
    files["trainer.pt"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    reseal(path, files=files)                                  # the forger knows about hashes
    with pytest.raises(CheckpointError, match="trainer.pt is refused"):
        load_checkpoint(path).trainer
    assert not mark.exists()


# -- faults 11 and 12: other networks, wrong files

@pytest.mark.fault(12)
def test_prefixes_are_dropped_on_both_sides(run, tmp_path):
    state = run.network.state_dict()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        save_checkpoint(tmp_path/prefix, 1, {prefix + k: v for k, v in state.items()}, None, None,
                        run.config)
        assert load_checkpoint(tmp_path/prefix).model.keys() == state.keys()
    wrapped = nn.Module()
    wrapped.module = create_unet(run.config)
    load_weights(wrapped, state)
    assert torch.equal(wrapped.module.conv_in.weight, run.network.conv_in.weight)


def test_a_part_named_module_is_no_prefix():
    network = nn.ModuleDict({"module": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    assert module._strip(network.state_dict()).keys() == network.state_dict().keys()


@pytest.mark.fault(11)
def test_another_architecture_names_keys_shapes_and_settings(run, tmp_path):
    run.save(1)
    found = load_checkpoint(run.root)
    wide = load_config("default", {**TINY, "model.base_channels": 16})
    with pytest.raises(CheckpointError) as caught:
        load_weights(create_unet(wide), found.model, found.path, config_diff(found.config, wide))
    text = str(caught.value)
    for part in (str(found.path), "more shapes",
                 "conv_in.weight: (8, 3, 3, 3) in the checkpoint, (16, 3, 3, 3) here",
                 "model.base_channels: 8 in the checkpoint, 16 here"):
        assert part in text, text
    with pytest.raises(CheckpointError, match="2 missing: weight, bias"):
        load_weights(nn.Linear(1, 1), {})
    with pytest.raises(CheckpointError, match="1 not in this network: extra"):
        load_weights(nn.ReLU(), {"extra": torch.zeros(1)})


def test_a_mismatch_changes_nothing(run):
    before = run.network.conv_in.weight.clone()
    state = {k: v + 1 for k, v in run.network.state_dict().items()}
    state.pop("conv_out.bias")
    with pytest.raises(CheckpointError): load_weights(run.network, state)
    assert torch.equal(run.network.conv_in.weight, before)


@pytest.mark.fault(12)
def test_optimizer_state_is_recognised(run):
    path = run.save(1)
    for state in (run.optimizer.state_dict(), load_checkpoint(path).trainer):
        with pytest.raises(CheckpointError, match="this is optimizer state"):
            load_weights(run.network, state)
    with pytest.raises(CheckpointError, match="trainer.pt is optimizer state.*step_00000001"):
        load_checkpoint(path/"trainer.pt")
    with pytest.raises(CheckpointError, match="pass the checkpoint's folder"):
        load_checkpoint(path/"model.safetensors")


# -- finding

def test_no_such_checkpoint_names_what_is_near(run, tmp_path):
    for step in (5, 10): run.save(step)
    for wrong in (tmp_path/"rum", run.root/"checkpoints"/"step_00000007", run.root/"x"/"y"):
        with pytest.raises(FileNotFoundError) as caught: find_checkpoint(wrong)
        text = str(caught.value)
        assert str(wrong) in text and "steps 5, 10" in text and "manifest.json" in text
    (tmp_path/"lonely"/"run").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="it holds none.*train one first"):
        find_checkpoint(tmp_path/"lonely"/"run")


def test_relative_and_empty_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint at nothing/here"):
        find_checkpoint("nothing/here")


def test_every_way_to_name_one(run):
    path = run.save(10)
    assert path == find_checkpoint(run.root) == find_checkpoint(run.root/"checkpoints")
    assert path == find_checkpoint(str(path)) == find_checkpoint(f"{path}/")
    elsewhere = Path(shutil.copytree(path, run.root.parent/"best"))    # copied under another name
    assert find_checkpoint(elsewhere) == elsewhere and load_checkpoint(elsewhere).step == 10


def test_steps_are_ordered_as_numbers_and_unfinished_ones_ignored(run):
    for step in (9, 100_000_000, 10): run.save(step)
    (run.root/"checkpoints"/"step_00000011.tmp").mkdir()
    (run.root/"checkpoints"/"step_notes").mkdir()
    (run.root/"checkpoints"/"step_00000012").touch()
    assert [load_checkpoint(p).step for p in list_checkpoints(run.root)] == [9, 10, 100_000_000]
    with pytest.raises(CheckpointError, match="interrupted"):
        find_checkpoint(run.root/"checkpoints"/"step_00000011.tmp")
    run.save(13)
    assert "step_00000011.tmp" not in run.names() and "step_notes" in run.names()
    assert list_checkpoints(run.root/"nowhere") == []


# -- pruning

def test_prune_keeps_the_newest_whole_ones(run):
    for step in range(1, 6): run.save(step)
    (run.root/"checkpoints"/"step_00000005"/"trainer.pt").unlink()
    deleted = prune_checkpoints(run.root, 2)
    assert [p.name for p in deleted] == ["step_00000001", "step_00000002"]
    assert run.names() == [f"step_0000000{n}" for n in (3, 4, 5)]     # 5 is damaged: left alone
    assert prune_checkpoints(run.root, 0) == []


def test_prune_never_deletes_what_was_just_saved(run):
    "After going back to step 1, later steps of the older branch are still there."
    for step in (1, 5, 6): run.save(step)
    run.save(2, keep=1)
    assert load_checkpoint(run.root/"checkpoints"/"step_00000002").step == 2


# -- fault 26: devices

@pytest.mark.fault(26)
def test_storages_from_another_device_load_on_the_cpu(run, monkeypatch):
    "A file whose tensors say that they lived on `cuda:0`."
    path, buffer = run.save(1), io.BytesIO()
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
    torch.save({"optimizer": None, "x": torch.arange(4)}, buffer)
    monkeypatch.undo()
    assert b"cuda:0" in buffer.getvalue()
    (path/"trainer.pt").write_bytes(buffer.getvalue())
    found = Checkpoint(path, json.loads((path/"manifest.json").read_text()), "cpu")
    assert found.trainer["x"].tolist() == [0, 1, 2, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_saved_on_a_gpu_loaded_on_the_cpu(tmp_path):
    run = Run(tmp_path)
    network = run.network.cuda()
    ema, optimizer = EMA(network), create_optimizer(run.config.training, network)
    network(torch.randn(1, 3, 8, 8).cuda(), torch.zeros(1).cuda()).sum().backward()
    optimizer.step()
    save_checkpoint(run.root, 1, network, ema, optimizer, run.config)
    found = load_checkpoint(run.root)
    assert found.model["conv_in.weight"].device.type == "cpu"
    assert found.trainer["optimizer"]["state"][0]["exp_avg"].device.type == "cpu"
    assert load_checkpoint(run.root, "cuda").model["conv_in.weight"].device.type == "cuda"
