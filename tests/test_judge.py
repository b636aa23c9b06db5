"Judging from the command line: what it refuses, and that nothing but the images decides."
import json, os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_model import cli, evaluation, features, judge as judging
from diffusion_model.config import load_data_config
from diffusion_model.counters import counter_normal
from diffusion_model.dataset import create_dataset, draw_shapes
from test_cli import DATA as DATA_ROOT, ROOT, SMALL

DATA = ["--train_size", "400", "--test_size", "300", "--image_size", "16"]
METRICS = ["--metrics", "fd,kid,mind,precision,recall,density,coverage,accuracy,memorised",
           "--features", "shapes-a,pixels"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A run with classes and one without."
    top = tmp_path_factory.mktemp("judged")
    for name, classes in (("classes", "8"), ("plain", "0")):
        words = ["--config", "quickstart", *SMALL, *DATA, "--max_steps", "2", "--num_classes",
                 classes, "--guidance_scale", "1", "--no-progress", "--output_dir", str(top/name)]
        assert cli.train_command(words) == 0
    return top


@pytest.fixture
def evaluate(command, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("DIFFUSION_MODEL_CACHE", str(tmp_path_factory.mktemp("cache")))
    return lambda *words: command(cli.evaluate_command, words)


def pictures(folder, images, labels=None):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        name = f"{i:05d}" if labels is None else f"{i:05d}_{labels[i]}"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder/f"{name}.png")
    return folder


SHAPES = ("--config", "quickstart", *DATA)


@pytest.mark.parametrize("name, message", [
    ("ten", "found 10 in"), ("empty", "no images in"), ("mixed", "images of different sizes"),
    ("wide", "the reference, test, has (3, 16, 16)"), ("nan", "2 images that are not finite"),
    ("absent", "no folder"), ("broken", "is not a readable image")])
def test_samples_that_cannot_be_judged(evaluate, tmp_path, name, message):
    place, (images, _) = tmp_path/name, draw_shapes(1, torch.arange(120), 16)
    if name == "ten": pictures(place, images[:10])
    elif name == "empty": place.mkdir()
    elif name == "mixed": pictures(pictures(place, images)/"more", images[:, :, :8])
    elif name == "wide": pictures(place, images.repeat(1, 1, 1, 2))
    elif name == "broken": (pictures(place, images)/"a.png").write_bytes(b"PNG")
    elif name == "nan":
        floats = images.float().numpy()
        floats[[3, 70], 0, 0, 0] = np.nan
        place = tmp_path/"nan.npy"
        np.save(place, floats)
    evaluate("--samples", place, *SHAPES).says(2, message)


@pytest.mark.parametrize("words, message", [
    (["--num_samples", "10"], "found 10 in"), (["--num_samples", "many"], "a whole number"),
    (["--metrics", "fid"], "known are fd"), (["--metrics", ""], "--metrics: found ''"),
    (["--features", "shapes-c"], "known are shapes-a"), (["--reference", "absent"], "no folder"),
    (["--batch_size", "8"], "was settled when the model was trained"),
    (["--config", "quickstart"], "a checkpoint has its own"),
    (["--samples", "x"], "name what is to be judged")])
def test_words_that_make_no_sense(evaluate, runs, words, message):
    evaluate("--checkpoint", runs/"classes", *words).says(2, message)


def test_a_class_metric_needs_classes(evaluate, runs):
    evaluate("--checkpoint", runs/"plain", "--metrics", "accuracy").says(
        2, "accuracy needs samples of known classes: these are unconditional")


def test_missing_weights_are_named(evaluate, runs, monkeypatch, tmp_path):
    monkeypatch.setattr(features, "files", lambda package: tmp_path)
    evaluate("--checkpoint", runs/"classes", "--features", "shapes-a").says(2, "no weights at")


def test_a_reference_of_another_shape(evaluate, runs, tmp_path):
    other = pictures(tmp_path/"other", draw_shapes(1, torch.arange(120), 24)[0])
    evaluate("--checkpoint", runs/"classes", "--reference", other).says(2, "(3, 24, 24)")


def values(folder):
    found = json.loads((Path(folder)/"report.json").read_text())
    return {row["name"]: row["value"] for row in found["results"]}


def test_two_processes_find_what_one_finds(runs, tmp_path):
    "Each draws and looks at its share; the verdict is the same."
    words = ["--checkpoint", runs/"classes", "--num_samples", "150", "--steps", "2", *METRICS,
             "--no_cache", "--output_dir"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    code = "import sys; from diffusion_model.cli import evaluate_command as c; sys.exit(c())"
    script = tmp_path/"evaluate.py"
    script.write_text(code)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    for start, out in (([], "one"), (launcher, "two")):
        done = subprocess.run([sys.executable, *start, script, *map(str, words), tmp_path/out],
                              env=env, text=True, capture_output=True, timeout=240)
        assert done.returncode == 0, done.stderr
    one, two = values(tmp_path/"one"), values(tmp_path/"two")
    assert list(one) == list(two) and len(one) == 17
    for name in one: assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-3), name


def test_a_run_keeps_its_verdict(evaluate, runs):
    assert evaluate("--checkpoint", runs/"classes", "--num_samples", "100", "--steps", "2",
                    *METRICS).code == 0
    assert (runs/"classes"/"evaluation"/"step_00000002_seed_0"/"report.html").is_file()
    row = json.loads((runs/"classes"/"metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 2 and {"fd/shapes-a", "memorised/pixels"} <= set(row)


def test_labels_in_names_are_read(evaluate, tmp_path):
    images, labels = draw_shapes(1, torch.arange(160), 16)
    names = create_dataset(load_data_config("quickstart", DATA)).classes
    place = pictures(tmp_path/"named", images, [names[k] for k in labels])
    assert evaluate("--samples", place, *SHAPES, *METRICS).code == 0
    right = values(tmp_path/"named_evaluation")
    assert next(v for n, v in right.items() if n.startswith("accuracy")) > 0.95
    turned = pictures(tmp_path/"turned", images, [names[k] for k in labels.roll(1)])
    assert evaluate("--samples", turned, *SHAPES, *METRICS).code == 0
    wrong = values(tmp_path/"turned_evaluation")
    assert next(v for n, v in wrong.items() if n.startswith("accuracy")) < 0.05


def test_folder_against_folder(evaluate, tmp_path):
    images = draw_shapes(1, torch.arange(400), 16)[0]
    a, b = pictures(tmp_path/"a", images[:200]), pictures(tmp_path/"b", images[200:])
    assert evaluate("--samples", a, "--reference", b, "--features", "pixels", "--metrics",
                    "fd,recall").code == 0
    assert len(values(tmp_path/"a_evaluation")) == 2


# -- controls: what must come out right, through each eye
N = 800


@pytest.fixture(scope="module")
def court():
    data = load_data_config("quickstart", {"train_size": 3200, "test_size": 1600})
    datasets = create_dataset(data)
    return judging.create_judge(data, datasets), draw_shapes(1, torch.arange(N))


def fds(court, images, labels, metric="fd"):
    lines = court[0].judge(judging.tensor_images(images, labels))
    return {line.eye: line for line in lines if line.metric == metric}


def noisy(images):
    z = counter_normal(0, "noise", torch.arange(len(images)), images.shape[1:])
    return (images + 40*z).round().clamp(0, 255).to(torch.uint8)


def blurred(images):
    from torchvision.transforms.v2 import functional as F
    return F.gaussian_blur(images, [7, 7], [1.5, 1.5])


@pytest.mark.parametrize("metric", ["fd", "kid", "mind"])
@pytest.mark.parametrize("harm", ["noise", "blur", "a class is missing"])
def test_every_eye_sees_harm(court, harm, metric):
    _, (images, labels) = court
    good = fds(court, images, labels, metric)
    if harm == "noise": bad = fds(court, noisy(images), labels, metric)
    elif harm == "blur": bad = fds(court, blurred(images), labels, metric)
    else:
        every = torch.arange(2*N)
        bad = fds(court, *draw_shapes(1, every[every % 8 < 7][:N]), metric)
    for eye, line in bad.items():
        assert line.value > good[eye].value
        assert line.value > line.floor.mean + 2*line.floor.sd, (eye, line)


def test_a_copy_of_the_training_set_is_flagged(court):
    copies = draw_shapes(0, torch.arange(N))
    for line in fds(court, *copies, "memorised").values(): assert line.value == 1
    for line in fds(court, *court[1], "memorised").values(): assert line.value < 0.04


def test_order_and_batches_do_not_matter(court):
    judge, (images, labels) = court
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    lines = judge.judge(judging.tensor_images(images, labels))
    others = judge.judge(judging.tensor_images(images[order], labels[order], batch_size=37))
    for line, other in zip(lines, others):
        assert other.value == pytest.approx(line.value, rel=1e-3, abs=1e-4), line.name


def test_three_processes_share_all_images(court):
    "Whatever the number of processes, each image is looked at once, in order."
    judge, (images, labels) = court
    samples = judging.tensor_images(images[:101], labels[:101])
    parts = [judging.look(samples, judge.eyes[:1], SimpleNamespace(rank=r, size=3, gather=list))
             for r in range(3)]
    label = judge.eyes[0].label
    whole = judging.look(samples, judge.eyes[:1])
    joined = torch.cat([part.features[label] for part in parts])
    torch.testing.assert_close(joined, whole.features[label], rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.cat([part.labels for part in parts]), labels[:101])


def test_features_that_are_not_finite_are_refused(court):
    judge, (images, labels) = court
    class Eye:
        label = "mine@0"
        def __call__(self, x): return torch.full((len(x), 2), torch.nan)
    with pytest.raises(ValueError, match="mine@0 gives features that are not finite"):
        judging.look(judging.tensor_images(images), [Eye()])


def test_what_is_cached_depends_on_the_content(court, tmp_path):
    judge, (images, labels) = court
    def seen(x):
        by = judging.Judge(judge.eyes[:1], judging.tensor_images(x, name="a")._replace(
            content=str(x.sum().item())), cache=tmp_path)
        return by.seen(by.reference).features[judge.eyes[0].label]
    first, again = seen(images[:50]), seen(images[:50])
    assert torch.equal(first, again) and len(list(tmp_path.iterdir())) == 1
    assert not torch.equal(seen(images[50:100]), first) and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["fmnist-a", "fmnist-b", "mnist-a", "mnist-b"])
@pytest.mark.skipif(not (DATA_ROOT/"FashionMNIST").is_dir(), reason="needs the real data")
def test_eyes_of_real_images_see_harm(name):
    "Noise, blur and a missing class each score worse than other real images do."
    config = {"dataset": "FashionMNIST" if name.startswith("f") else "MNIST", "root": DATA_ROOT}
    data = load_data_config("fashion_mnist", config)
    test = judging.dataset_images(create_dataset(data).test, data, "test", 2000)
    (first, _), (one, labels) = test.read(0, 4000)
    eye = features.create_features(name)
    real, kept = eye(first), one[labels != 3]
    fine = evaluation.fd(eye(one), real)
    for harmed in (noisy(one), blurred(one), kept):
        assert evaluation.fd(eye(harmed), real) > 1.5*fine


def test_a_single_part_has_no_spread(evaluate, tmp_path):
    "Of 400 training images one part of 300: report.json stays JSON, which knows no NaN."
    def refuse(word): raise AssertionError(f"report.json holds {word}")
    place = pictures(tmp_path/"many", draw_shapes(1, torch.arange(300), 16)[0])
    done = evaluate("--samples", place, *SHAPES, "--metrics", "fd", "--features", "pixels")
    assert done.code == 0
    text = (tmp_path/"many_evaluation"/"report.json").read_text()
    row, = json.loads(text, parse_constant=refuse)["results"]
    assert row["floor"]["sd"] is None and row["floor"]["folds"] == 1


def test_copies_alone_can_be_asked_for(evaluate, tmp_path):
    place = pictures(tmp_path/"copies", draw_shapes(0, torch.arange(100), 16)[0])
    assert evaluate("--samples", place, *SHAPES, "--metrics", "memorised",
                    "--features", "pixels").code == 0
    assert list(values(tmp_path/"copies_evaluation").values()) == [1]
