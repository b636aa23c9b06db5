"Faults that were found in configs, and mended: what is written, and what is said about it."
import warnings
from pathlib import Path

import pytest
import yaml

from diffusion_model.config import (Config, ConfigError, SamplingConfig, load_config,
                                    load_saved_config, migrate_config, save_config)

FIXTURE = Path(__file__).resolve().parent.parent/"fixtures"/"run_0_1_0"/"config.yaml"


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.yaml"):
        path = tmp_path/name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(text, bytes): path.write_bytes(text)
        else: path.write_text(text, encoding="utf-8")
        return path
    return write


def lines(name="quickstart", overrides=()):
    with pytest.raises(ConfigError) as error: load_config(name, overrides)
    return error.value.lines


# -- 10: channels that no network can have

@pytest.mark.mended(10)
@pytest.mark.parametrize("channels, says", [(2, "4"), (1, "4"), (3, "4"), (25, "24 or 26")])
def test_base_channels_that_cannot_be(channels, says):
    line = next(x for x in lines("quickstart", {"base_channels": channels, "norm_groups": 1})
                if x.startswith("model.base_channels"))
    assert f"found {channels}" in line and says in line


@pytest.mark.mended(10)
def test_the_suggested_channels_are_accepted():
    for channels in (4, 24, 26):
        load_config("quickstart", {"base_channels": channels, "norm_groups": 1})


# -- 21: files

@pytest.mark.mended(21)
def test_a_file_that_is_not_utf_8(write):
    path = write("logging:\n  # Übung\n  project: übung\n".encode("latin-1"))
    line, = lines(path)
    assert line == f"{path}: not UTF-8: byte 0xdc in line 2; save the file as UTF-8"


@pytest.mark.mended(21)
def test_files_are_utf_8_in_any_locale(write, monkeypatch):
    "What is written reads back, also where the locale's encoding is another."
    monkeypatch.setattr("locale.getencoding", lambda: "latin-1")
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "latin-1")
    cfg = load_config("quickstart", {"project": "Übung β"})
    path = save_config(cfg, write("", "saved.yaml"))
    assert "Übung β" in path.read_bytes().decode("utf-8") and load_config(path) == cfg


@pytest.mark.mended(21)
@pytest.mark.parametrize("text, says", [
    ("1: 2", "1: no such section or field"),
    ("training: {1: 2}", "training.1: no such field"),
    ("training: {null: 2}", "training.None: no such field"),
    ("base: 3", "base: found 3; allowed: the name of a config, or a path"),
    ("base: [quickstart]", "base: found ['quickstart']; allowed: the name of a config"),
    ("base: ''", "base: found ''; allowed: the name of a config"),
    ("base: .", "config: found '.'; allowed: the name of a config, or a path"),
])
def test_keys_and_bases_that_are_no_names(write, text, says):
    found = lines(write(text))
    assert any(says in line for line in found), found


@pytest.mark.mended(21)
def test_a_base_that_no_file_can_be(write):
    assert "neither a file nor a shipped config" in lines(write(f"base: {'x'*5000}"))[0]


@pytest.mark.mended(21)
def test_a_file_that_cannot_be_read(write, monkeypatch):
    def refuse(*_, **__): raise PermissionError(13, "Permission denied")
    path = write("training: {seed: 1}")
    monkeypatch.setattr(Path, "read_text", refuse)
    assert lines(path) == [f"{path}: cannot be read: Permission denied"]


@pytest.mark.mended(21)
def test_a_base_is_looked_for_beside_its_file_first(write, tmp_path, monkeypatch):
    write("training: {seed: 1}", "there/common.yaml")
    write("training: {seed: 2}", "common.yaml")
    write("training: {seed: 3}", "there/quickstart.yaml")
    monkeypatch.chdir(tmp_path)
    for base, seed in (("common", 1), ("common.yaml", 1), ("quickstart", 3), ("../common.yaml", 2)):
        assert load_config(write(f"base: {base}", "there/mine.yaml")).training.seed == seed, base
    assert load_config(write("base: common", "elsewhere/mine.yaml")).training.seed == 2
    assert load_config(write("base: default", "there/mine.yaml")).training.seed == 0


# -- 21: numbers

@pytest.mark.mended(21)
@pytest.mark.parametrize("field, text, found, allowed", [
    ("training.seed", str(2**63), str(2**63), ">= 0 and < 2**63"),
    ("training.seed", str(2**64), str(2**64), ">= 0 and < 2**63"),
    ("data.data_seed", str(2**63), str(2**63), ">= 0 and < 2**63"),
    ("training.learning_rate", "1e400", "inf", "a finite number > 0"),
    ("training.max_grad_norm", "1e400", "inf", "a finite number >= 0"),
    ("diffusion.sigma_max", "1e400", "inf", "a finite number > 0"),
    ("sampling.churn_max", "1e400", "inf", "a finite number > 0"),
    ("sampling.guidance_interval", "[0, 1e400]", "inf", "a list of 2, each a finite number >= 0"),
    ("training.epochs", "1e300", "1e+300", "<= 1000000"),
    ("training.max_steps", "1" + "0"*15, "1" + "0"*15, "<= 1000000000"),
    ("training.max_steps", "9"*5000, "(5002 characters)", "a whole number >= 1"),
    ("training.batch_size", "10000000", "10000000", "<= 1000000"),
    ("data.num_workers", "1000", "1000", ">= 0 and <= 128"),
    ("data.train_size", "1" + "0"*12, "1" + "0"*12, "<= 1000000000"),
    ("sampling.steps", "1" + "0"*12, "1" + "0"*12, "<= 1000000"),
    ("sampling.num_samples", "1" + "0"*12, "1" + "0"*12, "<= 1000000000"),
    ("diffusion.timesteps", "1" + "0"*12, "1" + "0"*12, "<= 1000000"),
])
def test_numbers_beyond_all_bounds(write, field, text, found, allowed):
    "In a file and on the command line: field, value found, values allowed."
    section, name = field.split(".")
    for said in (lines(write(f"base: quickstart\n{section}: {{{name}: {text}}}")),
                 lines("quickstart", [f"--{field}", text])):
        assert any(line.startswith(f"{field}: found ") and found in line and allowed in line
                   for line in said), said


@pytest.mark.mended(21)
def test_the_largest_numbers_are_accepted():
    cfg = load_config("quickstart", {"seed": 2**63 - 1, "max_steps": 10**9, "num_workers": 128})
    assert cfg.training.seed == 2**63 - 1
    with pytest.raises(ValueError): cfg.training.learning_rate = float("nan")


def test_sane_limits_are_not_told_to_who_keeps_them():
    line, = lines("quickstart", ["--max_steps", "0"])
    assert line == "training.max_steps: found 0; allowed: a whole number >= 1"


# -- 21: values from Python

@pytest.mark.mended(21)
@pytest.mark.parametrize("overrides, section, field, value", [
    ({"patience": None}, "training", "patience", None),
    ({"training.epochs": None}, "training", "epochs", None),
    ({"channel_multipliers": (1, 2, 2)}, "model", "channel_multipliers", [1, 2, 2]),
    ({"channel_multipliers": [1, 2, 2]}, "model", "channel_multipliers", [1, 2, 2]),
    ({"trackers": ("tensorboard",)}, "logging", "trackers", ["tensorboard"]),
    ({"ema_more": ()}, "training", "ema_more", []),
    ({"download": True}, "data", "download", True),
    ({"horizontal-flip": False}, "data", "horizontal_flip", False),
    ({"output_dir": Path("runs")/"a"}, "logging", "output_dir", "runs/a"),
    ({"output_dir": "123"}, "logging", "output_dir", "123"),
    ({"learning_rate": "1e-4"}, "training", "learning_rate", 1e-4),
    ({"channel_multipliers": "1,2,2"}, "model", "channel_multipliers", [1, 2, 2]),
])
def test_values_from_python(overrides, section, field, value):
    "What a file may say, a dictionary may say; text is read as on the command line."
    assert getattr(getattr(load_config("quickstart", overrides), section), field) == value


@pytest.mark.mended(21)
def test_wrong_values_from_python_are_told_like_others():
    said = lines("quickstart", {"max_steps": None, "lerning_rate": 1, 5: 6,
                                "training": {"seed": 1}})
    for part in ("training.max_steps: found None; allowed: a whole number >= 1",
                 "lerning_rate: no such section or field; did you mean training.learning_rate?",
                 "5: no such section or field", "training: is a section"):
        assert sum(line.startswith(part) for line in said) == 1, (part, said)


@pytest.mark.mended(21)
def test_a_negated_switch_takes_no_value():
    assert "it takes none" in lines("quickstart", ["--no-download=true"])[0]
    assert "true: not understood" in lines("quickstart", ["--no-download", "true"])[0]


# -- 21: EDM's weighting

@pytest.mark.mended(21)
@pytest.mark.parametrize("schedule, prediction", [("flow", "x0"), ("cosine", "eps"),
                                                  ("linear", "x0")])
def test_edms_weighting_where_it_has_no_bound(schedule, prediction):
    words = {"schedule": schedule, "prediction": prediction, "loss_weighting": "edm"}
    line, = lines("default", words)
    for part in ("diffusion.loss_weighting: found 'edm'", f"'{schedule}'", f"'{prediction}'",
                 "choose prediction 'edm', 'v' or 'flow', or loss_weighting 'min_snr'"):
        assert part in line
    for change in ({"prediction": "edm"}, {"prediction": "v"}, {"prediction": "flow"},
                   {"loss_weighting": "min_snr"}):
        load_config("default", words | change)


def test_edms_weighting_on_its_own_schedule():
    for prediction in ("edm", "x0", "eps", "v"):
        load_config("default", {"schedule": "ve", "prediction": prediction,
                                "loss_weighting": "edm"})


@pytest.mark.mended(21)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine", "sigmoid", "flow", "ve"])
def test_no_accepted_weighting_lets_the_loss_explode(schedule):
    "Whatever a config accepts, the loss's mean weight is of the order of one (EDM's own: 2e4)."
    import torch

    from diffusion_model.denoiser import create_denoiser, loss_weight
    u = (torch.arange(1000) + 0.5)/1000
    for prediction in ("eps", "x0", "v", "flow", "edm"):
        for weighting in ("uniform", "min_snr", "edm", "sigmoid"):
            words = {"schedule": schedule, "prediction": prediction, "loss_weighting": weighting}
            try: diffusion = load_config("default", words).diffusion
            except ConfigError: continue
            denoiser = create_denoiser(diffusion, torch.nn.Identity())
            weight = loss_weight(denoiser, denoiser.schedule.sample_timesteps(u), weighting).mean()
            assert weight < (2e4 if schedule == "ve" and weighting == "edm" else 10), words


# -- 17: the home directory

@pytest.mark.mended(17)
def test_home_in_output_dir(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path/"me"))
    for cfg in (load_config("quickstart", ["--output_dir", "~/runs/a"]),
                load_config(write("logging: {output_dir: ~/runs/a}"))):
        assert cfg.logging.output_dir == str(tmp_path/"me"/"runs"/"a")
    assert load_config("quickstart", ["--output_dir", "a~/b"]).logging.output_dir == "a~/b"
    assert "no-such-user" in lines("quickstart", ["--output_dir", "~no-such-user/a"])[0]


# -- names of before

def test_logit_is_logistic_now(write):
    "In a file, in a command, in Python: accepted, and you are told. In a saved config: noted."
    for make in (lambda: load_config("quickstart", ["--spacing", "logit"]).sampling,
                 lambda: load_config(write("sampling: {spacing: logit}")).sampling,
                 lambda: SamplingConfig(spacing="logit")):
        with pytest.warns(UserWarning, match="'logit' is called 'logistic' now"):
            assert make().spacing == "logistic"
    values = Config().model_dump()
    values["sampling"]["spacing"] = "logit"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cfg, notes = load_saved_config(write(yaml.safe_dump(values)))
    assert cfg == Config() and notes == ["sampling.spacing: 'logit' is called 'logistic' now"]
    assert values["sampling"]["spacing"] == "logit"  # what is passed in is left as it is
    assert migrate_config(values)[0] == Config().model_dump()


def test_a_run_of_0_1_0_is_a_unet():
    cfg, notes = load_saved_config(FIXTURE)
    assert cfg.model.name == "unet" and cfg.model.base_channels == 4
    assert "model.name: not known then; 'unet'" in notes
    assert cfg.training.objective == "diffusion" and cfg.data.space == "pixels"
