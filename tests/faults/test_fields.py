"Faults 19 to 21: what is written in a config, and meant otherwise."
import subprocess, sys

import pytest
from PIL import Image

from diffusion_model.config import ConfigError, load_config
from runs import ENVIRONMENT, words


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path/"mine.yaml").write_text(text)
        return tmp_path/"mine.yaml"
    return write


def refused(path, overrides=()):
    with pytest.raises(ConfigError) as caught: load_config(path, overrides)
    return caught.value.lines


# -- YAML

@pytest.mark.fault(19)
@pytest.mark.parametrize("text, value", [("1e-4", 1e-4), ("1e4", 1e4), ("1.e-4", 1e-4),
                                         ("0.5", 0.5), ("017", 17.), ("3", 3.)])
def test_what_looks_like_a_number_is_one(write, text, value):
    "YAML 1.1 takes 1e-4 for text and 017 for fifteen."
    found = load_config(write(f"training: {{learning_rate: {text}}}")).training.learning_rate
    assert found == value and type(found) is float


@pytest.mark.fault(19)
def test_a_whole_number_stays_one(write):
    assert load_config(write("training: {seed: 017, max_steps: 100}")).training.seed == 17
    line, = refused(write("training: {max_steps: 1e4}"))
    assert line.startswith("training.max_steps: found 10000.0; allowed: a whole number >= 1")


@pytest.mark.fault(19)
@pytest.mark.parametrize("text", ["no", "12:30:45", "on", "y", "1_000", "0x10", "2024-01-01"])
def test_text_is_text_and_no_number_or_truth(write, text):
    "YAML 1.1 takes these for false, 45045, true, true, 1000, 16 and a date."
    assert load_config(write(f"logging: {{project: {text}}}")).logging.project == text
    line, = refused(write(f"training: {{seed: {text}}}"))
    assert line == f"training.seed: found {text!r}; allowed: a whole number >= 0"
    path = write(f"training: {{learning_rate: {text}}}")
    assert "training.learning_rate: found" in refused(path)[0]
    line, = refused(write(f"data: {{horizontal_flip: {text}}}"))
    assert line == f"data.horizontal_flip: found {text!r}; allowed: true or false"


@pytest.mark.fault(19)
def test_a_key_that_stands_twice_is_named_with_its_lines(write):
    path = write("training:\n  seed: 1\n  max_steps: 5\n  seed: 2\n")
    line, = refused(path)
    assert line == f"{path}: seed: stands twice, in lines [2, 4]: keep one"


@pytest.mark.fault(19)
@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir ['{mark}']",
                                 "!!python/name:os.mkdir", "!!python/tuple [1]",
                                 "!mine {{}}", "!!python/object/new:os.mkdir {{args: ['{mark}']}}"])
def test_tags_that_build_objects_are_refused(write, tmp_path, command, tag):
    mark = tmp_path/"was_here"
    path = write("training:\n  seed: " + tag.format(mark=mark))
    command.train("--config", path)
    command.says(2, path, "not YAML", tag.split()[0].replace("!!", "tag:yaml.org,2002:"), "line 2")
    assert not mark.exists()


# -- typos

LIGHT = """
import sys
from diffusion_model.cli import train_command
code = train_command(sys.argv[1:])
print(sorted(m for m in ("torch", "torchvision", "numpy", "PIL", "matplotlib") if m in sys.modules))
sys.exit(code)
"""


@pytest.mark.fault(20)
@pytest.mark.parametrize("where", ["file", "command line", "both"])
def test_every_typo_is_named_at_once_before_anything_is_loaded(write, tmp_path, where):
    "Nothing heavy is imported, which makes it quick; no data is looked for, nothing is written."
    path = write("base: quickstart\ntraining: {lerning_rate: 1, batch_size: many}\nmodle: {}\n"
                 if where != "command line" else "base: quickstart\n")
    argv = ["--config", str(path), "--dataset", "folder", "--root", "nowhere", "--output_dir",
            str(tmp_path/"run")]
    if where != "file":
        argv += ["--training.lerning_rate=1", "--guidance_scle", "2", "--dropout", "7"]
    done = subprocess.run([sys.executable, "-c", LIGHT, *argv], env=ENVIRONMENT, cwd=tmp_path,
                          text=True, capture_output=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    said = ["training.lerning_rate: no such field; did you mean learning_rate?"]
    if where != "command line":
        said += ["training.batch_size: found 'many'; allowed: a whole number >= 1",
                                         "modle: no such section or field; did you mean model?"]
    if where != "file":
        said += ["guidance_scle: no such section or field; did you mean sampling.guidance_scale?",
                                 "model.dropout: found 7; allowed: a number >= 0 and < 1"]
    assert sorted(lines) == sorted(f"diffusion-train: error: {line}" for line in said)
    assert done.stdout.strip() == "[]" and not (tmp_path/"run").exists()


# -- clashes

@pytest.mark.fault(21)
@pytest.mark.parametrize("change, says", [
    ({"image_size": 28, "channel_multipliers": "[1,1,1,1]", "patch_size": 1},
     ["data.image_size: found 28", "4 levels", "a multiple of 8", "choose 24 or 32"]),
    ({"image_size": 28, "channel_multipliers": "[1,1,1]", "patch_size": 2},
     ["found 28", "choose 24 or 32"]),
    ({"base_channels": 12, "norm_groups": 8, "channel_multipliers": "[1,3]"},
     ["model.norm_groups: found 8", "does not divide 12 channels", "is 12"]),
    ({"train_size": 5}, ["training.batch_size: found 6", "data.train_size = 5",
                         "choose at most that"]),
    ({"num_classes": 7}, ["model.num_classes: found 7", "shapes has 8 classes", "choose 8, or 0"]),
])
def test_fields_that_do_not_fit_together(tmp_path, command, change, says):
    command.train(*words(tmp_path/"run", **change))
    command.says(2, *says)
    assert not (tmp_path/"run").exists()


@pytest.mark.fault(21)
def test_the_suggested_value_is_accepted(tmp_path):
    for change in ({"image_size": 24}, {"image_size": 32}):
        load_config("quickstart", words(tmp_path, channel_multipliers="[1,1,1,1]", patch_size=1,
                                        **change)[2:])
    load_config("quickstart", words(tmp_path, base_channels=12, norm_groups=12,
                                    channel_multipliers="[1,3]")[2:])


@pytest.mark.fault(21)
def test_a_batch_larger_than_a_folder(tmp_path, command):
    for i in range(10): Image.new("RGB", (8, 8)).save(tmp_path/f"{i}.png")
    command.train(*words(tmp_path/"run", dataset="folder", root=tmp_path, batch_size=9,
                         num_classes=0, guidance_scale=1))
    command.says(2, "batch_size: found 9", "8 images", "choose at most 8")


@pytest.mark.fault(21)
def test_two_clashes_come_together(tmp_path, command):
    command.train(*words(tmp_path/"run", image_size=28, channel_multipliers="[1,1,1,1]",
                         patch_size=1, train_size=5))
    command.says(2, "data.image_size: found 28", "training.batch_size: found 6")
