"Checkpoints under fault: kills, full disks, damage, malice, wrong paths and wrong networks."
import errno, hashlib, json, math, os, random, shutil, signal, subprocess, sys
import textwrap, threading, time, warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import diffusion_model.checkpoint as module
from diffusion_model.checkpoint import (CheckpointError, find_checkpoint,
                                        list_checkpoints, load_checkpoint, load_weights,
                                        prune_checkpoints, save_checkpoint, wait_for_checkpoints)
from diffusion_model.config import config_diff, load_config
from diffusion_model.ema import EMA
from diffusion_model.optimizer import create_optimizer

FILES = ["model.safetensors", "ema.safetensors", "trainer.pt", "config.yaml", "manifest.json"]
TINY = {"model.base_channels": 8, "model.norm_groups": 4, "model.channel_multipliers": "1",
        "model.num_res_blocks": 1, "model.attention_resolutions": "[]", "data.image_size": 8}


class Tiny(nn.Module):
    "As wide as the config says; with enough parts to be told from another width."
    def __init__(self, config):
        super().__init__()
        width = config.model.base_channels
        self.conv_in, self.conv_out = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 1)
        self.body = nn.Sequential(*(nn.Conv2d(width, width, 3, padding=1) for _ in range(12)))

    def forward(self, x, time, cond=None): return self.conv_out(self.body(self.conv_in(x)))


class Run:
    "A tiny run that can save itself."
    def __init__(self, root, **fields):
        self.root, self.config = Path(root)/"run", load_config("default", {**TINY, **fields})
        torch.manual_seed(0)
        self.network = Tiny(self.config)
        self.ema = EMA(self.network)
        self.optimizer = create_optimizer(self.config.training, self.network)
        self.network(torch.randn(1, 3, 8, 8), torch.zeros(1)).sum().backward()
        self.optimizer.step()
        self.ema.update(0)

    def save(self, step, wait=True, **kwargs):
        path = save_checkpoint(self.root, step, self.network, kwargs.pop("ema", self.ema),
                               self.optimizer, self.config, **kwargs)
        if wait: wait_for_checkpoints()
        return path

    def names(self): return sorted(os.listdir(self.root/"checkpoints"))


pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@pytest.fixture
def run(tmp_path): return Run(tmp_path)


@pytest.fixture
def held(monkeypatch):
    "The background work of saves waits until this event is set (at the latest when the test ends)."
    go, real = threading.Event(), module._settle
    def settle(*args):
        assert go.wait(60)
        real(*args)
    monkeypatch.setattr(module, "_settle", settle)
    yield go
    go.set()
    wait_for_checkpoints()


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
    path = save_checkpoint(run.root, 0, run.network.state_dict(), None, None, run.config)
    assert sorted(os.listdir(path)) == ["config.yaml", "manifest.json", "model.safetensors"]
    found = load_checkpoint(run.root)
    assert (found.step, found.ema, found.classes, found.network_name) == (0, None, None, None)
    assert torch.equal(found.model["conv_in.weight"], run.network.conv_in.weight)


def test_a_model_without_anything_to_resume_from_says_so(run):
    path = save_checkpoint(run.root, 0, run.network, run.ema, None, run.config)
    with pytest.raises(CheckpointError,
                       match="step_00000000 holds weights alone.*no trainer.pt to resume"):
        load_checkpoint(path).trainer
    run.save(1)
    assert load_checkpoint(run.root).trainer["optimizer"]["state"]


def test_extra_alone_is_worth_a_trainer_file(run):
    save_checkpoint(run.root, 0, run.network, None, None, run.config, extra={"seen": 7})
    assert load_checkpoint(run.root).trainer == {"seen": 7, "optimizer": None}


def test_further_networks_by_name(run):
    decoder = nn.Linear(2, 3)
    path = save_checkpoint(run.root, 4, {"model": run.network, "decoder": decoder.state_dict()},
                           {"ema": run.ema, "ema_0.9": run.ema}, run.optimizer, run.config)
    wait_for_checkpoints()
    assert sorted(os.listdir(path)) == sorted([*FILES, "decoder.safetensors",
                                               "ema_0.9.safetensors"])
    found = load_checkpoint(run.root)
    assert list(found.networks) == ["model", "decoder"] and list(found.emas) == ["ema", "ema_0.9"]
    assert torch.equal(found.weights("decoder")["weight"], decoder.weight)
    assert found.weights("decoder") is found.networks["decoder"] and found.weights() is found.model
    assert found.weights("ema_0.9").keys() == run.network.state_dict().keys()
    with pytest.raises(CheckpointError, match="no 'encoder'; it has model, decoder, ema, ema_0.9"):
        found.weights("encoder")
    flip(path/"decoder.safetensors")
    with pytest.raises(CheckpointError, match="decoder.safetensors"): load_checkpoint(path)


@pytest.mark.parametrize("names",
                         [["decoder"], ["model", "ema"], ["model", "ema_x"], ["model", "a/b"],
                                   ["model", "../x"], ["model", ""], ["model", "1"]])
def test_names_of_networks(run, names):
    with pytest.raises(ValueError, match="the main one is 'model'"):
        save_checkpoint(run.root, 1, {n: run.network for n in names}, None, None, run.config)
    assert not run.root.exists()


def test_a_network_of_the_users_own_leaves_its_name(run):
    run.save(1, network_name="Mine")
    assert load_checkpoint(run.root).network_name == "Mine"
    run.save(2)
    assert load_checkpoint(run.root).network_name is None


def test_an_older_version_is_told_to_upgrade_only_where_it_must(run):
    "What 0.1.0 can read has its format, 1; what it cannot has a later one."
    form = lambda path: json.loads((path/"manifest.json").read_text())["format"]
    assert form(run.save(1, network_name="Mine")) == 1
    assert form(save_checkpoint(run.root, 2, run.network, run.ema, None, run.config)) == 2
    assert form(save_checkpoint(run.root, 3, {"model": run.network, "x": run.network}, run.ema,
                                run.optimizer, run.config)) == 2


@pytest.mark.parametrize("name", ["model", "ema"])
def test_weights_into_a_network(run, name):
    run.save(1)
    network, source = Tiny(run.config), run.network if name == "model" else run.ema.network
    want = source.state_dict()
    load_weights(network, load_checkpoint(run.root).weights(name))
    for k, v in network.state_dict().items(): assert torch.equal(v, want[k])


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
    entry, replace, rmtree = module._entry, module.Path.replace, module.shutil.rmtree
    install, sync, sha256 = module._install, module._sync, module._sha256
    module.torch.set_num_threads(1)                   # a fork has no threads

    def die(): os.kill(os.getpid(), signal.SIGKILL)
    def dying_entry(path):
        if path.name != moment: return entry(path)
        os.truncate(path, path.stat().st_size//2)
        die()
    def dying_install(unfinished, final):
        if moment == "manifest.json":
            os.truncate(unfinished/moment, 100)
            die()
        install(unfinished, final)
    def dying_sync(path):
        if moment == "synced": die()
        sync(path)
    def dying_sha256(path):
        if moment == "hashed": die()
        return sha256(path)
    def dying_replace(self, target):
        if moment == "before rename" or moment == self.name: die()
        done = replace(self, target)
        if moment == "after rename": die()
        return done
    def dying_rmtree(path, **kwargs):
        if moment != "deleting": return rmtree(path, **kwargs)
        os.unlink(os.path.join(path, "trainer.pt"))
        die()

    def save_for_ever(run):
        module._entry, module._install = dying_entry, dying_install
        module.Path.replace = dying_replace
        module._sync, module._sha256 = dying_sync, dying_sha256
        module.shutil.rmtree, step = dying_rmtree, 2
        while True:
            run.save(step, keep=1, wait=moment != "never")
            step += 1

    for moment in sys.argv[1:]:
        run = Run(Path({root!r})/moment)
        run.save(1)
        print("ready", flush=True)
        if moment == "never": save_for_ever(run)
        if (child := os.fork()) == 0: save_for_ever(run)
        print(os.waitpid(child, 0)[1], flush=True)
""")
AFTER = ["after rename", "synced", "hashed", "manifest.tmp", "deleting"]
MOMENTS = [*FILES, "before rename", *AFTER]


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
    assert found.step == (2 if moment in AFTER else 1)
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
    "Between the two renames only `.old` has the step; after them both do, until all is safe."
    run.save(1, classes=["old"])
    real, calls = Path.replace, []
    def replace(self, target):
        if len(calls) > moment: raise SystemExit
        calls.append(1)
        return real(self, target)
    monkeypatch.setattr(module.Path, "replace", replace)
    with pytest.raises((SystemExit, CheckpointError)): run.save(1, classes=["new"])
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
    def full(*_): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(module, "_write_trainer", full)
    with pytest.raises(OSError, match="No space left on device.*last good: none"): run.save(1)
    assert run.names() == []


@pytest.mark.fault(5)
@pytest.mark.parametrize("limit",
                         [20_000, 80_000])       # the weights are too large, the moments are
def test_a_file_size_limit(tmp_path, limit):
    "A real limit of the operating system, in a process of its own."
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_checkpoint import Run
run = Run({str(tmp_path)!r})
run.save(1)
files = {{p.name: p.stat().st_size for p in next((run.root/"checkpoints").iterdir()).iterdir()}}
assert 20_000 < files["model.safetensors"] < 80_000 < files["trainer.pt"]
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try: run.save(2, keep=1)
except OSError as error: print(error)
print(run.names())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "last good: step 1" in done.stdout and "File too large" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "['step_00000001']"


# -- faults 8 and 9: damage

@pytest.mark.fault(8)
@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["cut", "empty", "flipped", "longer", "missing"])
def test_damage_is_found_and_named(run, name, kind, settled, monkeypatch):
    "By the hash, and by the sums of pages that a checkpoint is born with."
    run.save(1)
    if not settled: monkeypatch.setattr(module, "_settle", lambda *_: None)
    path = run.save(2)/name
    assert settled != ("pages" in (path.parent/"manifest.json").read_text())
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
    {}, {"../../secret": {"bytes": 1, "sha256": ""}}, {"/etc/passwd": {"bytes": 1, "sha256": ""}},
    {"ema_/../../x.safetensors": {"bytes": 1, "sha256": ""}}])
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
    wrapped.module = Tiny(run.config)
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
        load_weights(Tiny(wide), found.model, found.path, config_diff(found.config, wide))
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


# -- the best

def test_pruning_keeps_the_best_of_all_that_ever_were(run):
    scores = [0.5, 0.2, 0.3, None, 0.4, 0.25, math.nan, 0.3]
    for step, score in enumerate(scores, 1):
        run.save(step, keep=2, score=score)
        names = {step, max(step - 1, 1),
                 scores.index(min(s for s in scores[:step] if s == s and s)) + 1}
        assert run.names() == [f"step_{n:08d}" for n in sorted(names)], step
    found = load_checkpoint(run.root, best=True)
    assert (found.step, found.score) == (2, 0.2)
    assert load_checkpoint(run.root).step == 8 and load_checkpoint(run.root).score == 0.3
    run.save(9, keep=1, keep_best=False, score=0.9)
    assert run.names() == ["step_00000009"]


def test_of_equals_the_newest_is_the_best(run):
    for step in (1, 2, 3): run.save(step, score=0.5)
    assert find_checkpoint(run.root, best=True).name == "step_00000003"
    prune_checkpoints(run.root, 1)
    assert run.names() == ["step_00000003"]


def test_a_damaged_best_is_told_and_the_next_best_taken(run):
    for step, score in ((1, 0.3), (2, 0.1), (3, 0.2), (4, 0.4)): run.save(step, score=score)
    flip(run.root/"checkpoints"/"step_00000002"/"model.safetensors")
    flip(run.root/"checkpoints"/"step_00000003"/"manifest.json")
    with pytest.warns(UserWarning) as told: assert load_checkpoint(run.root, best=True).step == 1
    assert [w for w in told if "step_00000002/model" in str(w.message)]
    assert [w for w in told if "step_00000003/manifest" in str(w.message)]


def test_without_a_score_there_is_no_best(run):
    path = run.save(1)
    run.save(2, score=math.nan)
    with pytest.raises(CheckpointError,
                       match="no checkpoint in .*run was saved with a validation loss"):
        load_checkpoint(run.root, best=True)
    with pytest.raises(CheckpointError, match="step_00000001 is one step.*pass .*checkpoints"):
        load_checkpoint(path, best=True)


# -- several averages

def test_several_averages(run):
    more = EMA(run.network, 0.5)
    with torch.no_grad(): more.network.conv_in.weight += 1
    path = run.save(1, ema={"ema": run.ema, "ema_0.999": more, "ema_x": more.state_dict()})
    assert {"ema.safetensors", "ema_0.999.safetensors", "ema_x.safetensors"} < set(os.listdir(path))
    found = load_checkpoint(path)
    assert list(found.emas) == ["ema", "ema_0.999", "ema_x"]
    assert found.ema.keys() == run.network.state_dict().keys()
    for name, average in (("ema", run.ema), ("ema_0.999", more)):
        assert torch.equal(found.emas[name]["conv_in.weight"], average.network.conv_in.weight)
    assert torch.equal(found.ema["conv_in.weight"], run.ema.network.conv_in.weight)
    flip(path/"ema_0.999.safetensors")
    with pytest.raises(CheckpointError, match="ema_0.999.safetensors"): load_checkpoint(path)


def test_averages_are_read_only_when_asked_for(run):
    path = run.save(1, ema={"ema": run.ema, "ema_0.9": run.ema})
    found = load_checkpoint(path)
    (path/"ema_0.9.safetensors").unlink()
    assert found.ema is not None and found.emas.get("other") is None
    with pytest.raises(CheckpointError, match="ema_0.9.safetensors cannot be read"):
        found.emas["ema_0.9"]


def test_no_average(run):
    for step, none in enumerate((None, {})):
        found = load_checkpoint(run.save(step, ema=none))
        assert found.ema is None and dict(found.emas) == {}
    with pytest.raises(CheckpointError, match="has no 'ema'; it has model"): found.weights("ema")


@pytest.mark.parametrize("names",
                         [["other"], ["ema_0.9"], ["ema", "ema/../x"], ["ema", "model"],
                          ["ema", "ema_"]])
def test_names_of_averages(run, names):
    with pytest.raises(ValueError, match="the main one is 'ema'"):
        run.save(1, ema={n: run.ema for n in names})
    assert not run.root.exists()


# -- what goes on while training does

def test_a_save_returns_a_whole_checkpoint_before_it_is_durable(run, held):
    for step in (1, 2): (held.set(), run.save(step), held.clear())
    path = run.save(3, wait=False, keep=1)
    assert load_checkpoint(run.root).step == 3 and load_checkpoint(path).trainer["optimizer"]
    assert len(run.names()) == 3                                     # nothing is deleted before
    held.set()
    wait_for_checkpoints()
    assert run.names() == ["step_00000003"]
    entry = load_checkpoint(path).files["model.safetensors"]
    assert entry == {"bytes": (path/"model.safetensors").stat().st_size,
                     "sha256": hashlib.sha256((path/"model.safetensors").read_bytes()).hexdigest()}


def test_order_of_what_a_power_cut_can_tell_apart(run, monkeypatch):
    "Files, their folder and its parent are synced, then hashed, then older ones deleted."
    run.save(1)
    events, sync, sha256, remove = [], module._sync, module._sha256, module._remove
    for name, real in (("_sync", sync), ("_sha256", sha256), ("_remove", remove)):
        def seen(path, name=name, real=real):
            events.append((name, path.name))
            return real(path)
        monkeypatch.setattr(module, name, seen)
    path = run.save(2, keep=1)
    files = ["model.safetensors", "ema.safetensors", "trainer.pt", "config.yaml"]
    assert events == [*(("_sync", n) for n in (*files, "manifest.json", path.name, "checkpoints")),
                      *(("_sha256", n) for n in files), ("_sync", "manifest.tmp"), ("_sync",
                                                                                    path.name),
                      ("_remove", "step_00000001")]


@pytest.mark.parametrize("fails", ["_sync", "_sha256", "prune_checkpoints"])
def test_a_failure_in_the_background_is_told_and_deletes_nothing(run, monkeypatch, fails):
    run.save(1)
    def fail(*_): raise OSError(errno.EIO, "Input/output error")
    with monkeypatch.context() as broken:
        broken.setattr(module, fails, fail)
        run.save(2, wait=False, keep=1)                    # is written all the same
        with pytest.raises(CheckpointError,
                           match="step_00000002 was written.*not safe.*Input/output"):
            wait_for_checkpoints()
        run.save(3, wait=False, keep=1)
        with pytest.raises(CheckpointError, match="step_00000003 was written"):
            run.save(4, wait=False, keep=1)
        with pytest.raises(CheckpointError, match="step_00000004"): wait_for_checkpoints()
        wait_for_checkpoints()                             # told once
    assert len(run.names()) == 4 and load_checkpoint(run.root).step == 4
    run.save(5, keep=1)
    assert run.names() == ["step_00000005"]


def test_damage_before_the_hash_is_not_sealed_by_it(run, held):
    path = run.save(1, wait=False)
    flip(path/"model.safetensors")
    held.set()
    with pytest.raises(CheckpointError, match="model.safetensors.*damaged"): wait_for_checkpoints()
    with pytest.raises(CheckpointError, match="model.safetensors"): load_checkpoint(path)


def test_a_checkpoint_deleted_by_hand_needs_no_disk(run, held):
    path = run.save(1, wait=False)
    shutil.rmtree(path)
    held.set()
    wait_for_checkpoints()


def test_a_process_ends_only_after_its_last_save(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import diffusion_model.checkpoint as module
from test_checkpoint import Run
run, real = Run({str(tmp_path)!r}), module._settle
def slow(*args):
    time.sleep(0.3)
    if {{fail}}: raise OSError("disk on fire")
    real(*args)
run.save(1)
module._settle = slow
run.save(2, wait=False, keep=1)
"""
    for fail, names in ((True, ["step_00000001", "step_00000002"]), (False, ["step_00000002"])):
        shutil.rmtree(tmp_path/"run", ignore_errors=True)
        done = subprocess.run([sys.executable, "-c", code.format(fail=fail)], capture_output=True,
                              text=True, timeout=60)
        assert sorted(os.listdir(tmp_path/"run"/"checkpoints")) == names, done.stderr
        assert ("disk on fire" in done.stderr) == fail


def test_an_older_step_of_the_same_number_outlives_the_save(run, held):
    "`.old` goes only once the new one is on the disk; a torn one never replaces it."
    held.set(), run.save(1, classes=["old"]), held.clear()
    run.save(1, wait=False, classes=["new"])
    assert run.names() == ["step_00000001", "step_00000001.old"]
    os.truncate(run.root/"checkpoints"/"step_00000001"/"trainer.pt", 10)      # power was cut
    with pytest.warns(UserWarning): assert load_checkpoint(run.root).classes == ["old"]
    held.set()
    with pytest.raises(CheckpointError): wait_for_checkpoints()
    held.clear()
    run.save(1, wait=False, classes=["newer"])
    assert run.names() == ["step_00000001", "step_00000001.old"]
    assert load_checkpoint(run.root/"checkpoints"/"step_00000001.old").classes == ["old"]
    assert load_checkpoint(run.root).classes == ["newer"]
    held.set()
    wait_for_checkpoints()
    assert run.names() == ["step_00000001"]


def test_each_file_is_read_once_to_verify_and_only_what_is_asked_for_again(run, monkeypatch):
    run.save(1)
    read = []
    for name in ("_sha256", "load_file"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda p, real=real,
                            **kw: (read.append(p.name), real(p, **kw))[1])
    load_checkpoint(run.root).model
    assert sorted(read) == sorted([*FILES[:-1], "model.safetensors"])


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc to measure by")
def test_a_save_copies_nothing(tmp_path, run):
    "40 MB of weights, averages and moments take hardly any memory of their own to save."
    # not by ru_maxrss, which begins with what the parent had
    code = f"""
import re, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from test_checkpoint import Run
from diffusion_model.checkpoint import save_checkpoint, wait_for_checkpoints
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])/1024
run = Run({str(tmp_path)!r})
run.save(1)
state = {{str(i): torch.ones(1_000_000) for i in range(10)}}
before = peak()
save_checkpoint(run.root, 2, state, state, None, run.config, extra={{"moments": [state, state]}})
wait_for_checkpoints()
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert float(done.stdout) < 20, done.stderr             # MB, of 160 written


# -- older versions

OLD = Path(__file__).parent/"fixtures"/"run_0_1_0"    # stopped at step 3 of 6, by version 0.1.0


def test_a_run_of_0_1_0_opens_and_says_what_is_new(tmp_path):
    found = load_checkpoint(OLD)
    assert (found.step, found.version, found.score, list(found.emas)) == (3, "0.1.0", None, ["ema"])
    sampling = found.config.sampling
    assert (sampling.solver, sampling.steps) == ("ddim", 5)                 # as it says
    assert "training.accumulation: not known then; 1" in found.notes
    assert not [n for n in found.notes if "sampling.solver" in n]
    assert save_checkpoint(tmp_path, 3, found.model, found.emas, found.trainer["optimizer"],
                           found.config)
    assert load_checkpoint(tmp_path).notes == []
    with pytest.raises(CheckpointError, match="validation loss"): load_checkpoint(OLD, best=True)


def test_a_run_of_0_1_0_goes_on_as_it_would_have(tmp_path):
    from diffusion_model.callbacks import Callback
    from diffusion_model.training import Trainer
    losses = []
    class Note(Callback):
        def after_step(self, trainer, metrics): losses.append(metrics["loss"])
    config = load_config(OLD/"config.yaml", {"output_dir": str(tmp_path)})
    trainer = Trainer(config, callbacks=[Note()])
    assert list(trainer.resume(OLD)) == ["logging.output_dir"] and trainer.step == 3
    trainer.fit()
    assert losses == pytest.approx([0.50210, 0.49105, 0.49486],
                                   rel=1e-3)    # of 0.1.0, steps 4 to 6


def test_losses_that_0_1_0_had_not_told_yet_are_told(tmp_path, monkeypatch):
    from diffusion_model import callbacks, training
    old = load_checkpoint(OLD)
    old.trainer["window"] = [0.9, 0.7]  # of steps 2 and 3: a line of metrics is due every 10
    monkeypatch.setattr(training, "load_checkpoint", lambda *_, **__: old)
    log = callbacks.Log(10)
    training.Trainer(load_config(OLD/"config.yaml", {"output_dir": str(tmp_path)}),
                     callbacks=[log]).resume(OLD)
    assert log.state == {"losses": [0.9, 0.7], "skipped": 0}
