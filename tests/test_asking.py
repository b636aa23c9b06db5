"What diffusion-sample is asked for besides classes: prompts, numbers, pictures."
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_model import cli
from diffusion_model.dataset import FIGURES, draw_shapes
from diffusion_model.generation import load_denoiser

CONFIG = """
base: quickstart
model:
  num_classes: 0
  base_channels: 8
  channel_multipliers: [1]
  num_res_blocks: 1
  attention_resolutions: []
  norm_groups: 4
  conditions:
    label: {kind: labels, count: 8}
    caption: {kind: text, words: 32, length: 5, layers: 1, width: 8, heads: 2}
    image: {kind: image, channels: 4}
data: {dataset: folder, root: DATA, image_size: 8, image_condition: inpainting, caption_length: 5}
training: {max_steps: 2, batch_size: 4, device: cpu}
sampling: {steps: 2, num_samples: 4}
logging: {output_dir: RUN, log_every: 1, progress: false}
"""
NAMES, COLOURS = list(FIGURES), ("red", "blue", "green")


def make_data(root, n=40):
    images, labels = draw_shapes(0, torch.arange(n), 8)
    lines = []
    for i, (image, label) in enumerate(zip(images, labels)):
        file = f"{NAMES[label]}/{i}.png"
        (root/NAMES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(root/file)
        lines.append({"file": file, "caption": f"a {COLOURS[i % 3]} {NAMES[label]}"})
    (root/"captions.jsonl").write_text("\n".join(map(json.dumps, lines)))


def write_config(folder, old="", new=""):
    text = CONFIG.replace("DATA", str(folder/"data")).replace("RUN", str(folder/"run"))
    assert old in text
    (folder/"config.yaml").write_text(text.replace(old, new))
    return str(folder/"config.yaml")


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    "A run that knows labels, captions and pictures with holes."
    folder, show = tmp_path_factory.mktemp("told"), warnings.showwarning
    make_data(folder/"data")
    assert cli.train_command(["--config", write_config(folder)]) == 0
    warnings.showwarning = show
    return folder


@pytest.fixture
def ask(told, tmp_path, capsys, monkeypatch):
    "Sample; gives the exit code, the files, the complaints, and the conditions that were used."
    import diffusion_model.generation as generation
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    used, real = [], generation.generate
    def generate(denoiser, n, cond, *rest, **more):
        used.append(cond)
        return real(denoiser, n, cond, *rest, **more)
    monkeypatch.setattr(generation, "generate", generate)

    def sample(*words):
        capsys.readouterr()
        code = cli.sample_command(["--checkpoint", str(told/"run"), "--output_dir",
                                   str(tmp_path/"out"), "--overwrite", *map(str, words)])
        files = sorted(p.name for p in (tmp_path/"out").glob("*")) if code == 0 else []
        return code, files, capsys.readouterr().err, used[-1] if used else None
    return sample


def test_prompts_take_turns(ask, tmp_path, told):
    code, files, err, cond = ask("--prompt", "a red star", "--prompt", "A Blue, blue heart!",
                                 "--num_samples", 3)
    assert (code, err) == (0, "")
    assert files == ["00000_a-red-star.png", "00001_A-Blue-blue-heart.png", "00002_a-red-star.png",
                     "captions.jsonl", "grid.png"]
    words = load_denoiser(told/"run").vocabulary
    assert [words.decode(c) for c in cond["caption"]] == ["a red star", "a blue blue heart",
                                                          "a red star"]
    assert cond["label"].tolist() == [-1]*3  # the prompt says what to draw
    lines = [json.loads(line) for line in (tmp_path/"out/captions.jsonl").read_text().splitlines()]
    assert lines[1] == {"file": files[1], "caption": "A Blue, blue heart!"}
    assert "captions.jsonl" not in ask()[1]  # --overwrite takes it away


def test_a_prompt_beside_a_label(ask):
    code, files, _, cond = ask("--prompt", "a red star", "--labels", "ring,none")
    assert files[:2] == ["00000_ring_a-red-star.png", "00001_a-red-star.png"]
    ring = sorted(NAMES).index("ring")  # folders are in the alphabet's order
    assert cond["label"].tolist() == [ring, -1]*2


def test_a_file_of_prompts(ask, tmp_path):
    (tmp_path/"prompts.txt").write_text("a red star\n\n  a green moon  \n", "utf-8")
    assert len(ask("--prompts", tmp_path/"prompts.txt")[1]) == 2 + 2  # an image for each
    for how in (["--num_samples", 5], ["--sampling.num_samples", 5]):
        assert len(ask("--prompts", tmp_path/"prompts.txt", *how)[1]) == 5 + 2
    (tmp_path/"empty.txt").write_text("\n\n")
    (tmp_path/"bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name, says in (("empty", "is empty"), ("bytes", "no text in UTF-8"), ("x", "no such file")):
        code, _, err, _ = ask("--prompts", tmp_path/f"{name}.txt")
        assert code == 2 and says in err


def test_words_that_were_never_learned(ask):
    code, _, err, cond = ask("--prompt", "a redd star over the sea and the land")
    assert code == 0 and cond["caption"][0, 1] == 1
    assert "no word 'redd'; near it are red" in err and "no word 'sea'" in err
    assert "has 9 words, and the model reads the first 5" in err


def test_without_any_wish(ask):
    "Labels in turn, no caption, and the pictures of the held-out images."
    code, files, err, cond = ask()
    assert (code, err, files[0]) == (0, "", "00000_cross.png")
    assert cond["label"].tolist() == [0, 1, 2, 3]
    assert cond["caption"].tolist() == [[2, 0, 0, 0, 0]]*4
    assert cond["image"].shape == (4, 4, 8, 8) and cond["image"].any()


def test_pictures_to_go_by(ask, told):
    one = told/"data"/"star"/"4.png"
    _, _, _, cond = ask("--images", one, "--num_samples", 2)
    image = torch.from_numpy(np.array(Image.open(one))).permute(2, 0, 1)/127.5 - 1
    hole = cond["image"][:, 3:]
    assert set(hole.unique().tolist()) == {0., 1.} and not torch.equal(hole[0], hole[1])
    torch.testing.assert_close(cond["image"][:, :3], image*(1 - hole), atol=1e-5, rtol=0)
    several = ask("--images", told/"data"/"star", "--num_samples", 7)[3]["image"]
    kept = (1 - several[0, 3])*(1 - several[5, 3]) > 0  # there are five stars
    assert torch.equal(several[0, :3, kept], several[5, :3, kept]) and kept.any()


def test_data_that_are_gone(ask, told):
    (told/"data").rename(told/"elsewhere")
    try: code, _, err, cond = ask()
    finally: (told/"elsewhere").rename(told/"data")
    assert code == 0 and "its data cannot be read" in err and "--images names some" in err
    assert not cond["image"].any()


def test_a_condition_by_its_name(ask, tmp_path):
    rows = np.arange(2*4*8*8, dtype="float32").reshape(2, 4, 8, 8)/512
    np.save(tmp_path/"rows.npy", rows)
    cond = ask("--cond", f"image={tmp_path/'rows.npy'}", "--cond", "caption=a red star",
               "--cond", "label=star")[3]
    assert torch.equal(cond["image"], torch.from_numpy(rows)[[0, 1, 0, 1]])
    assert cond["caption"][0, 1] > 2 and cond["label"].unique().tolist() == [6]


@pytest.mark.parametrize("words, says", [
    (["--cond", "style=3"], "--cond: found 'style'; what this model takes: label, caption, image"),
    (["--cond", "caption"], "--cond: found 'caption'; write NAME=VALUE"),
    (["--cond", "caption=a", "--prompt", "b"], "'caption' is asked for twice"),
    (["--prompt", "a", "--prompts", "b"], "--prompts: given beside --prompt"),
    (["--cond", "label=stra"], "--cond label: found 'stra'; did you mean star?"),
    (["--cond", "label=8"], "0 to 7"), (["--labels", "stra"], "--labels: found 'stra'"),
    (["--images", "nowhere"], "--images: no such file or folder: 'nowhere'"),
    (["--cond", "image=nowhere.npy"], "--cond image: no such file")])
def test_refusals(ask, words, says):
    code, _, err, _ = ask(*words)
    assert code == 2 and says in err and err.count("\n") == 1


def test_numbers_of_a_wrong_shape(ask, tmp_path):
    np.save(tmp_path/"few.npy", np.zeros((2, 3, 8, 8)))
    np.save(tmp_path/"words.npy", np.array(["a"]))
    for name, says in (("few", "of shape (2, 3, 8, 8); allowed: numbers of shape (4, 8, 8)"),
                       ("words", "allowed: numbers of shape")):
        code, _, err, _ = ask("--cond", f"image={tmp_path}/{name}.npy")
        assert code == 2 and says in err


def test_vectors_from_the_command_line():
    from diffusion_model.condition_config import VectorCondition
    read = lambda text: cli._read_array("--cond pose", text, VectorCondition(size=2), None, 4, None)
    assert read("0.5,-1").tolist() == [[0.5, -1]]
    for wrong in ("0.5", "1,2,3", "a,b", ""):
        with pytest.raises(ValueError, match="--cond pose: found "): read(wrong)


@pytest.mark.parametrize("old, new, says", [
    ("image: {kind: image, channels: 4}", "image: {kind: image, channels: 3}",
     "model.conditions.image.channels: found 3; the data's 'image' has 4"),
    ("length: 5, layers", "length: 6, layers",
     "model.conditions.caption.length: found 6; data.caption_length is 5"),
    ("words: 32", "words: 8", "model.conditions.caption.words: found 8; the captions' vocabulary "),
    ("image_condition: inpainting, ", "", "found 'image', and the data in "),
    ("count: 8", "count: 7", "model.conditions.label.count: found 7; the data in "),
    ("    image: {kind", "    pose: {kind: vector, size: 2}\n    image: {kind",
     "give arrays with a row of 'pose' for each image")])
@pytest.mark.parametrize("how", [[], ["--dry_run"]])
def test_what_does_not_fit_the_data(told, tmp_path, capsys, monkeypatch, old, new, says, how):
    "Before the first step, in one line."
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    (tmp_path/"data").symlink_to(told/"data")
    code = cli.train_command(["--config", write_config(tmp_path, old, new), *how])
    err = capsys.readouterr().err
    assert code == 2 and says in err and err.count("\n") == 1, err
    assert not (tmp_path/"run").exists()


def test_previews_say_what_they_show(told):
    titles = (told/"run/samples/titles.txt").read_text().splitlines()
    assert len(titles) == 4 and all(t.split()[1] in COLOURS and t.split()[2] in NAMES
                                    for t in titles)


def test_it_can_be_judged(told, tmp_path, capsys, monkeypatch):
    "Conditions of samples are those of held-out images, with their labels."
    from diffusion_model.config import load_config
    from diffusion_model.dataset import create_dataset
    from diffusion_model.judge import model_images
    from diffusion_model.report import create_model
    datasets = create_dataset(load_config(str(told/"config.yaml")).data)
    denoiser = load_denoiser(told/"run")
    model = create_model(denoiser, datasets, 6)
    assert sorted(model.cond) == sorted(model.x0_cond) == ["caption", "image", "label"]
    images, labels = next(iter(model_images(denoiser, 6, model.cond).read(0, 6)))
    assert len(images) == 6 and torch.equal(labels, model.cond["label"])
