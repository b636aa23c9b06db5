"Mended faults of the data: workers and signals, memory, folders, files, and data that has changed."
import os
import signal
import subprocess
import sys
import time
import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_model import dataset
from diffusion_model.config import DataConfig
from diffusion_model.dataset import (
    ArraySource, Batch, Datasets, ImageSet, LazySource, compare_data, create_dataset, create_loader,
    describe_data, list_images, read_image, scan_folder)
from diffusion_model.transforms import create_transform, to_tensor

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ["--config=quickstart", "--base_channels=8", "--norm_groups=4",
         "--attention_resolutions=[]", "--channel_multipliers=[1]", "--num_res_blocks=1",
         "--image_size=8", "--batch_size=6",
         "--max_steps=1000000", "--train_size=90", "--validation_size=6", "--test_size=6",
         "--device=cpu", "--log_every=1", "--checkpoint_every=1000000", "--validate_every=1000000",
         "--sample_every=1000000", "--num_samples=4", "--steps=2", "--progress=false"]
TRAIN = [sys.executable, "-m", "diffusion_model.train", *SMALL]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            "-m", "diffusion_model.train", *SMALL]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


def config(root, **change):
    return DataConfig(**{"dataset": "folder", "root": str(root), "image_size": 8,
                         "horizontal_flip": False, "validation_fraction": 0.1, **change})


def picture(path, colour=(200, 30, 90), size=(16, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    "Ten pictures of cats, ten of dogs, each of one brightness."
    root = tmp_path/"pictures"
    for i in range(20): picture(root/("cats" if i < 10 else "dogs")/f"{i:02}.png", (12*i,)*3)
    return root


# -- 1: a signal to the whole process group

def heed_interrupts():
    "A job in the background is born deaf to Ctrl-C, and so would be whom it starts."
    signal.signal(signal.SIGINT, signal.default_int_handler)


def start(command, run_dir, *options):
    "A run in a session of its own, in which a step has been made."
    process = subprocess.Popen(
        [*command, f"--output_dir={run_dir}", *options], env=ENVIRONMENT, cwd=run_dir.parent,
        text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=heed_interrupts)
    metrics, until = run_dir/"metrics.jsonl", time.time() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        if process.poll() is not None or time.time() > until:
            process.kill()
            raise AssertionError("no step was made:\n" + process.communicate()[1])
        time.sleep(0.05)
    return process


def session_of(pid):
    "The processes that belong to a session, wherever they have gone since; none that has ended."
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try: fields = (entry/"stat").read_text().rsplit(")", 1)[1].split()
        except OSError: continue  # it has just ended
        if int(fields[3]) == pid and fields[0] != "Z": found.append(int(entry.name))
    return found


def ended(process, run_dir, code, seconds=40):
    "The run has ended with this code in time, has saved, and has left nobody behind."
    try: out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        for pid in session_of(process.pid): os.kill(pid, signal.SIGKILL)
        raise AssertionError(f"not at its end after {seconds} s: {process.communicate()}") from None
    assert process.returncode == code, (process.returncode, err)
    assert len(list(run_dir.glob("checkpoints/step_*/manifest.json"))) == 1, err
    assert not session_of(process.pid)


@linux
@pytest.mark.mended(1)
@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_group_saves_and_stops(tmp_path, sent, code):
    process = start(TRAIN, tmp_path/"run", "--num_workers=1")
    os.killpg(process.pid, sent)
    ended(process, tmp_path/"run", code)


@linux
@pytest.mark.mended(1)
def test_a_signal_to_every_single_process_saves_and_stops(tmp_path):
    "As service managers and some schedulers send it: to all, whatever their group."
    process = start(TRAIN, tmp_path/"run", "--num_workers=2")
    workers = [pid for pid in session_of(process.pid) if pid != process.pid]
    assert len({os.getpgid(pid) for pid in [process.pid, *workers]}) == 1 + len(workers) >= 3
    for sent in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM):
        for pid in workers: os.kill(pid, sent)
    process.send_signal(signal.SIGTERM)
    ended(process, tmp_path/"run", 143)


@linux
@pytest.mark.slow_fault
@pytest.mark.mended(1)
def test_timeout_saves_and_stops(tmp_path):
    process = start(["timeout", "20", *TRAIN], tmp_path/"run", "--num_workers=1")
    ended(process, tmp_path/"run", 124)


@linux
@pytest.mark.slow_fault
@pytest.mark.mended(1)
def test_a_launcher_that_is_stopped_saves_its_processes_work(tmp_path):
    process = start(TORCHRUN, tmp_path/"run", "--num_workers=1")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert len(list((tmp_path/"run").glob("checkpoints/step_*/manifest.json"))) == 1, err


def wait_until_gone(pids, seconds):
    until = time.time() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.time() < until:
        time.sleep(0.1)
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@linux
@pytest.mark.slow_fault
@pytest.mark.mended(1)
def test_workers_do_not_outlive_a_parent_that_was_killed(tmp_path):
    process = start(TRAIN, tmp_path/"run", "--num_workers=2")
    workers = [pid for pid in session_of(process.pid) if pid != process.pid]
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    assert not wait_until_gone(workers, 20)


LOADING = """
import multiprocessing, signal, sys, time
from itertools import islice
from diffusion_model import dataset
from diffusion_model.config import DataConfig

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    signal.signal(signal.SIGTERM, lambda *_: None)
    sets = dataset.create_dataset(DataConfig(dataset="shapes", train_size=64, image_size=8))
    batches = iter(dataset.create_loader(sets.train, 4, seed=0, num_workers=2))
    print("born", flush=True)
    for i, batch in enumerate(islice(batches, 40)):
        if i == 5: print("running", flush=True)
        time.sleep(0.02)
    assert not {signal.SIGTERM, signal.SIGINT} & signal.pthread_sigmask(signal.SIG_BLOCK, [])
    if sys.argv[2] == "held": raise SystemExit(batches)  # still alive at the very end
    print("all forty")
"""


@linux
@pytest.mark.mended(1)
@pytest.mark.parametrize("method, moment", [
    ("fork", "running"), *(
        pytest.param(method, moment, marks=pytest.mark.slow_fault)
        for method in ("spawn", "forkserver") for moment in ("born", "running"))])
def test_workers_of_every_kind_live_on_and_end(tmp_path, method, moment):
    script = tmp_path/"loading.py"
    script.write_text(LOADING)
    process = subprocess.Popen([sys.executable, script, method, moment], env=ENVIRONMENT, text=True,
                               start_new_session=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    while process.poll() is None and moment not in process.stdout.readline(): pass
    if moment == "born": time.sleep(0.5)  # a spawned worker is busy loading torch
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "all forty" in out, err
    assert not wait_until_gone(session_of(process.pid), 10)


@linux
@pytest.mark.mended(1)
def test_a_loader_that_is_alive_at_the_end_does_not_keep_the_program(tmp_path):
    script = tmp_path/"loading.py"
    script.write_text(LOADING)
    done = subprocess.run([sys.executable, script, "fork", "held"], env=ENVIRONMENT, text=True,
                          capture_output=True, timeout=30)
    assert done.returncode == 1


# -- 11: pinned memory

@pytest.mark.mended(11)
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_pinned_where_that_is_asked_for(monkeypatch, workers):
    pinned, asked = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x + 0) or pinned[-1])

    class Loader(dataset.DataLoader):
        def __init__(self, *args, pin_memory, **kw):
            asked.append(pin_memory)
            super().__init__(*args, **kw)
    monkeypatch.setattr(dataset, "DataLoader", Loader)
    sets = create_dataset(DataConfig(dataset="shapes", train_size=20, image_size=8))
    for pin in (False, True):
        batch = next(iter(create_loader(sets.train, 4, seed=0, num_workers=workers, pin=pin)))
        assert batch.images.shape == (4, 3, 8, 8)
        if workers: assert asked.pop() is pin and not asked
        else: assert [any(x is y for y in pinned) for x in batch] == [pin]*3


@pytest.mark.mended(11)
def test_without_a_gpu_nothing_is_pinned(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sets = create_dataset(DataConfig(dataset="shapes", train_size=20, image_size=8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for workers in (0, 1):
            next(iter(create_loader(sets.train, 4, seed=0, num_workers=workers, pin=True)))


@pytest.mark.mended(11)
def test_a_batch_moves_with_its_conditions():
    def moved(cond): return Batch(torch.zeros(3, 1, 2, 2), cond, torch.arange(3)).to("meta")
    assert moved(None).images.is_meta and moved(None).positions.tolist() == [0, 1, 2]
    assert moved(None).cond is None and moved(torch.arange(3)).cond.is_meta
    several = moved({"a": torch.arange(3), "b": torch.ones(3, 2)}).cond
    assert set(several) == {"a", "b"} and all(x.is_meta for x in several.values())


# -- 14: what workers keep in memory

class Sizes:
    "Stands for files: the i-th image has i + 1 bytes."
    def __call__(self, i): return torch.zeros(1, 1, 10, dtype=torch.uint8)


class Kept(LazySource):
    "Gives, instead of labels, how many bytes are kept."
    def read(self, indices):
        images, _ = super().read(indices)
        return images, torch.tensor([sum(x.numel() for x in self.cache.values())]*len(indices))


class Whole:
    "A transform that does nothing."
    def augment(self, images, positions): return torch.stack(images)


@pytest.mark.mended(14)
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_share_one_budget(workers):
    source = Kept(Sizes(), 100, keep=400)
    loader = create_loader(ImageSet(source, Whole()), 10, seed=0, num_workers=workers)
    kept = max(batch.cond.max().item() for batch in islice(loader, 20))
    assert kept == 400//max(workers, 1)


# -- 18: data that has changed

def described(root, **change): return describe_data(create_dataset(config(root, **change)))


@pytest.mark.mended(18)
def test_the_same_data_is_the_same_wherever_it_lies(folder, tmp_path, monkeypatch):
    there = described(folder)
    folder.rename(tmp_path/"elsewhere")
    monkeypatch.chdir(tmp_path)
    assert described("elsewhere") == there and compare_data(there, described("elsewhere")) == []
    assert there["classes"] == ["cats", "dogs"] and there["train"]["images"] == 16
    size = (tmp_path/"elsewhere"/"cats"/"00.png").stat().st_size
    assert there["train"]["files"]["cats/00.png"] == size


@pytest.mark.mended(18)
def test_a_renamed_class_is_noticed_with_the_labels_it_shifts(folder):
    then = described(folder)
    (folder/"cats").rename(folder/"felines")
    lines = compare_data(then, described(folder))
    assert lines[0] == "classes: label 0 was cats, is dogs, label 1 was dogs, is felines"
    assert len(lines) > 1


@pytest.mark.mended(18)
def test_fewer_more_and_other_images_are_told_by_how_much(tmp_path):
    root = tmp_path/"flat"
    for i in range(90): picture(root/f"{i:02}.png", (i, 0, 0))
    then = described(root)
    assert then["classes"] is None
    training = sorted(then["train"]["files"])
    for name in training[:7]: (root/name).unlink()
    picture(root/training[7], size=(40, 40))
    (line,) = [x for x in compare_data(then, described(root)) if x.startswith("train")]
    counts = f"train: {len(training)} images then, {len(described(root)['train']['files'])} now: "
    assert line.startswith(counts)
    assert f"7 gone ({training[0]}, {training[1]}, {training[2]}, …)" in line
    assert f"1 of another size ({training[7]})" in line
    then = described(root)
    picture(root/"new.png")
    assert any("1 new (new.png)" in x for x in compare_data(then, described(root)))


@pytest.mark.mended(18)
def test_images_that_change_sides_are_noticed(folder):
    lines = compare_data(described(folder), described(folder, data_seed=1))
    assert len(lines) == 3 and all("gone" in line and "new" in line for line in lines)


@pytest.mark.mended(18)
def test_many_files_are_kept_as_a_hash(folder):
    source = create_dataset(config(folder)).train.source
    few, all_told = (source.load.describe(torch.arange(20), most) for most in (5, 10**6))
    assert set(few) == {"digest"} and few["digest"] == all_told["digest"]
    assert few != source.load.describe(torch.arange(19), most=5)
    then, now = {"train": {"images": 9, "digest": "a"}}, {"train": {"images": 9, "digest": "b"}}
    now |= {"classes": None, "validation": {}, "test": {}}
    assert compare_data(then, now) == ["train: 9 images then, 9 now: not the same ones"]


@pytest.mark.mended(18)
def test_drawn_figures_are_their_seed_and_size():
    def shapes(**kw):
        return describe_data(create_dataset(DataConfig(dataset="shapes", train_size=9, **kw)))
    then = shapes()
    assert compare_data(then, shapes()) == []
    assert "seed was 0, is 1" in compare_data(then, shapes(data_seed=1))[0]
    assert "image_size was 32, is 16" in compare_data(then, shapes(image_size=16))[0]
    assert compare_data(then, shapes(test_size=7)) == ["test: 10000 images then, 7 now"]


def in_memory(images, cond=None, classes=None):
    sets = [ImageSet(ArraySource(images, cond, classes), create_transform(DataConfig()), part)
            for part in torch.arange(len(images)).split(4)]
    return Datasets(*sets, classes)


@pytest.mark.mended(18)
def test_arrays_are_known_by_their_bytes_and_conditions():
    images = torch.arange(12*3*4*4).remainder(251).to(torch.uint8).view(12, 3, 4, 4)
    then = describe_data(in_memory(images, torch.arange(12) % 2, ["a", "b"]))
    other, labels = images.clone(), torch.arange(12) % 2
    other[5, 0, 0, 0] += 1
    assert compare_data(then, describe_data(in_memory(other, labels, ["a", "b"]))) == [
        "validation: 4 images then, 4 now: not the same ones"]
    labels[9] = 0
    assert compare_data(then, describe_data(in_memory(images, labels, ["a", "b"]))) == [
        "test: 4 images then, 4 now: not the same ones"]
    several = {"x": torch.zeros(12, 2), "y": torch.arange(12)}
    conds = None, several, several["x"], several | {"x": torch.ones(12, 2)}
    assert len({describe_data(in_memory(images, c))["train"]["digest"] for c in conds}) == 4


@pytest.mark.mended(18)
def test_older_runs_that_remember_nothing_and_sets_without_a_source_are_no_error():
    class Own:
        def __len__(self): return 3
    now = describe_data(Datasets(Own(), Own(), Own(), None))
    assert now == {"classes": None, "train": {"images": 3}, "validation": {"images": 3},
                   "test": {"images": 3}}
    assert compare_data({}, now) == []
    assert compare_data({"classes": ["a"]}, now) == ["classes: a then, none now"]
    now["classes"] = ["a"]
    assert compare_data({"classes": ["a", "b"]}, now) == ["classes: 2 then, 1 now"]


# -- 20: files and folders

@pytest.mark.mended(20)
@pytest.mark.parametrize("skip", [False, True])
def test_a_named_pipe_is_no_picture(folder, skip):
    os.mkfifo(folder/"cats"/"pipe.png")
    says = "pipe.png: not a readable image: it is a named pipe, and only regular files"
    with pytest.raises(ValueError, match=says): read_image(folder/"cats"/"pipe.png")
    sets = create_dataset(config(folder, bad_images="skip" if skip else "error"))
    assert sum(len(s) for s in sets[:3]) == 21
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        def read(): return sum(len(s.batch(torch.arange(len(s))).images) for s in sets[:3])
        if skip: assert read() == 20
        else:
            with pytest.raises(ValueError, match=says): read()
    assert [says in str(w.message) for w in caught] == [True]*skip


@pytest.mark.mended(20)
def test_a_stray_picture_is_named_as_the_cause(folder):
    picture(folder/"stray.png")
    says = r"1 picture\(s\) \(stray.png\) beside the folders cats, dogs"
    with pytest.warns(UserWarning, match=says):
        assert scan_folder(folder)[2] is None
    (folder/"stray.png").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scan_folder(folder)[2] == ["cats", "dogs"]
        assert scan_folder(folder/"cats")[2] is None  # nothing but pictures: nothing to say


@pytest.mark.mended(20)
@pytest.mark.parametrize("names", [("train", "val"), ("Train", "Validation"), ("valid", "test"),
                                   ("training", "testing")])
def test_the_parts_of_a_split_are_no_classes(tmp_path, names):
    for name in (*names, "trains"): picture(tmp_path/name/"cats"/"a.png")
    with pytest.raises(ValueError, match=f"holds the folders {' and '.join(sorted(names))}, which"):
        scan_folder(tmp_path)
    (tmp_path/names[1]).rename(tmp_path/"planes")
    assert len(scan_folder(tmp_path)[2]) == 3


def write_mnist(root, n=20):
    raw = root/"MNIST"/"raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for shape, name in (((n, 28, 28), "images-idx3"), ((n,), "labels-idx1")):
            head = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
            (raw/f"{part}-{name}-ubyte").write_bytes(head + bytes(np.prod(shape)))
    return raw


@pytest.mark.mended(20)
@pytest.mark.parametrize("part", ["train-images-idx3", "t10k-labels-idx1"])
@pytest.mark.parametrize("content", [b"", b"\0\0", b"x"*3000, b"\0\0\x08\x01\0\0\0\x14" + bytes(7)])
def test_a_damaged_file_is_named_with_a_reason(tmp_path, part, content):
    file = write_mnist(tmp_path)/f"{part}-ubyte"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        create_dataset(DataConfig(dataset="MNIST", root=str(tmp_path), channels=1))
    start, _, reason = str(caught.value).partition(f"is damaged ({len(content)} bytes): ")
    assert str(file) in start and "--data.download true" in reason
    assert len(reason.split(";")[0]) > 10


@pytest.mark.mended(20)
def test_labels_that_do_not_belong_to_the_images_are_refused(tmp_path):
    raw, few = write_mnist(tmp_path), write_mnist(tmp_path/"few", 15)
    (few/"train-labels-idx1-ubyte").replace(raw/"train-labels-idx1-ubyte")
    with pytest.raises(ValueError, match="15 labels for 20 images"):
        create_dataset(DataConfig(dataset="MNIST", root=str(tmp_path), channels=1))


@pytest.mark.mended(20)
@pytest.mark.parametrize("kind, high", [(np.int32, "70000")])
def test_pictures_with_32_bits_are_refused_in_words(tmp_path, kind, high):
    values = np.full((8, 8), float(high)).astype(kind)
    Image.fromarray(values).save(tmp_path/"deep.tif")
    says = rf"deep.tif: .*found {high} to {high}; save it with 8 or 16"
    with pytest.raises(ValueError, match=says):
        read_image(tmp_path/"deep.tif", to_tensor)


@pytest.mark.mended(20)
def test_sixteen_bits_are_16_bits_in_every_format(tmp_path):
    x = np.full((2, 2), 257*100, dtype=np.uint16)
    for name in ("a.png", "a.tif"): Image.fromarray(x).save(tmp_path/name)
    (tmp_path/"a.pgm").write_bytes(b"P5 2 2 65535\n" + x.byteswap().tobytes())
    for path in tmp_path.iterdir():
        assert (read_image(path, to_tensor)*65535 - 257*100).abs().max() < 0.5, path


@pytest.mark.mended(20)
def test_tiny_pictures_are_counted_once(folder):
    for i in range(3): picture(folder/"cats"/f"tiny{i}.png", size=(30, 9))
    with pytest.warns(UserWarning) as caught: create_dataset(config(folder, image_size=20))
    assert len(caught) == 1
    assert "3 of 23 images are enlarged to more than twice" in str(caught[0].message)
    assert "tiny0.png: 30×9" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_dataset(config(folder, image_size=18))  # twice is what many want


@pytest.mark.mended(20)
def test_tiny_pictures_of_an_array_are_counted_once(tmp_path):
    write_mnist(tmp_path)
    data = DataConfig(dataset="MNIST", root=str(tmp_path), channels=1, image_size=64)
    with pytest.warns(UserWarning, match=r"20 of 20 images .* to 64 pixels \(28×28\)") as caught:
        create_dataset(data)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_dataset(data.model_copy(update={"image_size": 56}))


@pytest.mark.mended(20)
def test_class_names_that_a_command_cannot_choose(tmp_path):
    for name in ("Cat", "cat", "dog"): picture(tmp_path/"case"/name/"a.png")
    says = "Cat and cat differ only in case.*by number they are 0, 1"
    with pytest.warns(UserWarning, match=says):
        assert scan_folder(tmp_path/"case")[2] == ["Cat", "cat", "dog"]
    for name in ("a, b", "c"): picture(tmp_path/"comma"/name/"a.png")
    with pytest.warns(UserWarning, match="'a, b' can be mistaken .* use its number 0"):
        scan_folder(tmp_path/"comma")
    for name in ("a", "None"): picture(tmp_path/"none"/name/"a.png")
    with pytest.warns(UserWarning, match="'None' can be mistaken .* use its number 0"):
        scan_folder(tmp_path/"none")


# -- 17: a run's own output inside data.root

@pytest.mark.mended(17)
@pytest.mark.parametrize("place", ["run", "runs/first"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_run_inside_the_data_is_not_learned_from(folder, place, flat):
    root = folder/"cats" if flat else folder
    before = scan_folder(root)
    picture(root/place/"samples"/"step_00000010.png")
    assert list_images(root) != before[0]  # to be sure that it would be found
    (root/place/"config.yaml").write_text("data: {}")
    (root/place/"checkpoints").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scan_folder(root) == before
