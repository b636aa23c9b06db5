"Config files, overrides and what is said when they are wrong."
import json, subprocess, sys, typing
from types import SimpleNamespace
from typing import Literal

import pytest
import yaml
from pydantic import BaseModel, Field

import diffusion_model.config as module
from diffusion_model.config import (MIGRATIONS, PRECEDENCE, REGISTRIES, SECTIONS, SOLVER_OPTIONS,
                                    Config, ConfigError, config_diff, config_help,
                                    find_config, list_configs, load_config,
                                    load_saved_config, migrate_config, parse_overrides, save_config,
                                    solver_options)
from diffusion_model.networks import NETWORKS, Network


def lines(name="default", overrides=()):
    with pytest.raises(ConfigError) as error: load_config(name, overrides)
    return error.value.lines


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.yaml"):
        (tmp_path/name).write_text(text)
        return tmp_path/name
    return write


@pytest.mark.parametrize("name", list_configs())
def test_shipped_configs(name, tmp_path):
    cfg = load_config(name)
    assert load_config(save_config(cfg, tmp_path/"config.yaml")) == cfg
    load_config(name, ["--max_steps", "20"])  # small runs of any of them
    load_config(name, ["--max_steps", "1"])


def test_shipped_are_these():
    assert list_configs() == ["autoencoder", "avatars", "cifar10", "default",
                              "fashion_mnist", "image_folder", "latent", "mnist",
                              "quickstart", "super_resolution"]
def test_defaults_equal_the_file(): assert load_config("default") == Config()


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "configs/quickstart.yaml"])
def test_found_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name).name == "quickstart.yaml"


@pytest.mark.parametrize("words, field, value", [
    (["--training.learning_rate", "1e-4"], "training.learning_rate", 1e-4),
    (["--learning-rate=1e-4"], "training.learning_rate", 1e-4),
    (["--batch_size", "64"], "training.batch_size", 64),
    (["training.seed=7"], "training.seed", 7),
    (["--download"], "data.download", True),
    (["--no-horizontal-flip"], "data.horizontal_flip", False),
    (["--no_horizontal_flip"], "data.horizontal_flip", False),
    (["--horizontal_flip", "false"], "data.horizontal_flip", False),
    (["--channel_multipliers", "1,2"], "model.channel_multipliers", [1, 2]),
    (["--channel_multipliers=[1, 2]"], "model.channel_multipliers", [1, 2]),
    (["--crop", "none"], "data.crop", "none"),
    (["--output_dir", "123"], "logging.output_dir", "123"),
    (["--attention_head_dim", "null"], "model.attention_head_dim", None),
    (["--channels", "1"], "data.channels", 1),
    (["--trackers", "tensorboard"], "logging.trackers", ["tensorboard"]),
    (["--beta_start", "1e-5"], "diffusion.beta_start", 1e-5),
])
def test_overrides(words, field, value):
    cfg = load_config("default", words)
    section, name = field.split(".")
    assert getattr(getattr(cfg, section), name) == value


@pytest.mark.parametrize("size, value, shape", [
    ("32,64", [32, 64], (3, 32, 64)), ("[32, 64]", [32, 64], (3, 32, 64)),
    ((64, 32), [64, 32], (3, 64, 32)), ("48", 48, (3, 48, 48)), ([32, 32], 32, (3, 32, 32))])
def test_an_image_has_a_height_and_a_width(size, value, shape, write):
    data = module.load_data_config("default", {"image_size": size})
    assert (data.image_size, data.shape) == (value, shape)
    file = write(yaml.safe_dump({"base": "default", "data": {"image_size": value}}))
    assert module.load_data_config(file).shape == shape


def test_a_size_that_is_wrong_is_said_once():
    for size in ([32], [32, "a"], {}, 1.5):
        found = lines("default", {"image_size": size})
        assert len(found) == 1 and found[0].startswith(f"data.image_size: found {size!r}; "), found


def test_overrides_as_a_dict():
    assert load_config("default", {"training.max_steps": 20}).training.max_steps == 20
def test_the_last_override_wins():
    assert load_config("default", ["--seed", "1", "--seed", "2"]).training.seed == 2


@pytest.mark.parametrize("words, says", [
    (["--lerning_rate", "1"], "did you mean training.learning_rate?"),
    (["--training.lerning_rate", "1"], "did you mean learning_rate?"),
    (["--data.learning_rate", "1"], "did you mean training.learning_rate?"),
    (["--trainin.seed", "1"], "did you mean training?"),
    (["--batch_size", "many"], "training.batch_size: found 'many'; allowed: a whole number >= 1"),
    (["--batch_size", "0"], "found 0; allowed: a whole number >= 1"),
    (["--batch_size", "1.5"], "found 1.5"),
    (["--batch_size"], "needs a value"),
    (["--dropout", "1"], "allowed: a number >= 0 and < 1"),
    (["--solver", "dim"], "one of unipc, dpmpp_2m"),
    (["--optimizer", "adm"], "one of adamw, adam, sgd"),
    (["--horizontal_flip", "no"], "not understood"),
    (["--horizontal_flip=no"], "true or false"),
    (["nonsense"], "not understood"),
    (["--image_size", "28"], "choose 24 or 32"),
    (["--image_size", "4"], "choose 8"),
    (["--norm_groups", "48"], "the largest that divides all levels is 128"),
    (["--attention_resolutions", "7"], "sizes [32, 16, 8, 4]"),
    (["--attention_head_dim", "96"], "does not divide"),
    (["--schedule", "flow"], "choose 'flow', 'v', 'x0' or 'edm'"),
    (["--zero_terminal_snr"], "choose 'flow', 'v', 'x0' or 'edm'"),
    (["--schedule", "betas"], "needed for schedule 'betas'"),
    (["--betas", "[0.1, 0.2]"], "choose schedule 'betas'"),
    (["--schedule", "betas", "--betas", "[0.1, 0.2]"], "betas has 2"),
    (["--schedule", "betas", "--betas", "[0.1, 1.2]"], "diffusion.betas: found"),
    (["--sigma_min", "90"], "must be below sigma_max"),
    (["--schedule", "ve", "--spacing", "leading"], "choose 'trailing'"),
    (["--churn", "5"], "only 'edm' has it"),
    (["--guidance_interval", "[2, 1]"], "low < high"),
    (["--guidance_interval", "[2]"], "guidance_interval: found"),
    (["--schedule", "flow", "--prediction", "v", "--spacing", "leading"], "choose 'trailing'"),
    (["--timesteps", "20", "--steps", "10"], "at least 21"),
    (["--schedule", "scaled_linear", "--timesteps", "12", "--steps", "10"], "choose at least 21"),
    (["--schedule", "scaled_linear", "--beta_start", "0.03"], "above beta_end 0.02: swap them"),
    (["--sigma_min", "80"], "must be below sigma_max = 80.0"),
    (["--beta_start", "0.03"], "above beta_end 0.02: swap them"),
    (["--accumulation", "129"], "at most training.batch_size = 128"),
    (["--guidance_scale", "2", "--num_classes", "10", "--label_dropout", "0"],
     "training.label_dropout > 0"),
    (["--dataset", "shapes", "--num_classes", "10"], "shapes has 8 classes: choose 8, or 0"),
    (["--timesteps", "30", "--steps", "40"], "at most diffusion.timesteps = 30"),
    (["--eta", "0.5", "--solver", "euler"], "only 'ddim' has it"),
    (["--num_classes", "7"], "CIFAR10 has 10 classes"),
    (["--guidance_scale", "2"], "model.num_classes > 0"),
    (["--guidance_scale", "0"], "model.num_classes > 0"),
    (["--dataset", "shapes", "--train_size", "5"], "training.batch_size"),
    (["--image_size", "32,"], "data.image_size: found [32]; allowed: a whole number >= 1 and "
                              "<= 4096 or a list of 2, each a whole number >= 1 and <= 4096"),
    (["--image_size", "32,64,3"], "data.image_size: found [32, 64, 3]"),
    (["--image_size", "32,0"], "data.image_size: found [32, 0]"),
    (["--image_size", "[32, 5000]"], "data.image_size: found [32, 5000]"),
    (["--image_size", "32x64"], "data.image_size: found '32x64'"),
    (["--image_size", "0"], "data.image_size: found 0; allowed: a whole number >= 1"),
    (["--channels", "4"], "data.channels: found 4; CIFAR10 has 1 (grey) or 3 (colour)"),
    (["--channels", "2", "--dataset", "shapes"], "found 2; shapes has 1 (grey) or 3 (colour)"),
    (["--channels", "5", "--dataset", "folder"], "found 5; folder has 1 to 4"),
    (["--channels", "0"], "data.channels: found 0; allowed: a whole number >= 1"),
    (["--caption_words", "3"], "data.caption_words: found 3; allowed: a whole number >= 4"),
    (["--image_condition", "sketches"], "one of none, low_resolution, inpainting, sketch"),
])
def test_refused(words, says):
    assert any(says in line for line in lines("default", words)), lines("default", words)


@pytest.mark.parametrize("words", [
    {"schedule": "cosine", "timesteps": 30, "steps": 30}, {"batch_size": 8, "accumulation": 8},
    {"dataset": "shapes", "train_size": 128}, {"train_size": 5},  # CIFAR10's size is its own
    {"guidance_interval": [0, 1]}, {"timesteps": 21, "steps": 10}, {"num_classes": 10},
    {"dataset": "folder", "channels": 4}, {"dataset": "folder", "channels": 2},
    {"dataset": "arrays", "channels": 7}, {"dataset": "hf:x", "channels": 7},
    {"beta_start": 0.02}, {"dataset": "folder", "num_classes": 7}, {"eta": 1, "solver": "ddim"}])
def test_the_edges_of_what_is_allowed(words): load_config("default", words)


def test_errors_come_together(write):
    path = write("base: quickstart\ntraining: {lerning_rate: 1, batch_size: many}\n"
                 "modle: {}\ndata: {image_size: 30}")
    found = lines(path, ["--guidance_scle", "2", "--dropout", "7"])
    for word in ("lerning_rate", "batch_size", "modle", "guidance_scle", "dropout"):
        assert sum(word in line for line in found) == 1, (word, found)


@pytest.mark.parametrize("text, says", [
    ("training: {seed: 1, seed: 2}", "seed: stands twice, in lines [1, 1]"),
    ("training:\n  seed: 1\ndata: {}\ntraining:\n  seed: 2",
     "training: stands twice, in lines [1, 4]"),
    ("training: !!python/object/apply:os.getcwd []", "not YAML"),
    ("training: [", "not YAML"),
    ("- 1", "must hold sections"),
    ("training: 5", "a section holds fields"),
    ("learning_rate: 1", "must stand in its section: training.learning_rate"),
    ("base: nowhere", "nowhere"),
])
def test_bad_files(write, text, says):
    assert any(says in line for line in lines(write(text))), lines(write(text))


def test_bases_in_a_chain(write):
    write("base: quickstart\ntraining: {seed: 1, max_steps: 7}", "a.yaml")
    cfg = load_config(write("base: a.yaml\ntraining: {seed: 2}", "b.yaml"))
    assert (cfg.training.seed, cfg.training.max_steps, cfg.data.dataset) == (2, 7, "shapes")


def test_what_is_wrong_in_a_base_is_said(write):
    write("base: quickstart\ntrainig: {seed: 1}\ndata: 3", "a.yaml")
    found = lines(write("base: a.yaml\nsampling: {steps: many}", "b.yaml"))
    assert [line.split(":")[0] for line in found] == ["trainig", "data", "sampling.steps"]


def test_a_circle_of_bases(write):
    write("base: b.yaml", "a.yaml")
    assert "cannot be its own base" in lines(write("base: a.yaml", "b.yaml"))[0]


def test_a_circle_is_one_however_its_files_are_named(write, tmp_path):
    (tmp_path/"there").mkdir()
    write("base: there/../b.yaml", "a.yaml")
    found = lines(write("base: ./there/../a.yaml", "b.yaml"))
    assert len(found) == 1 and "cannot be its own base" in found[0] and len(found[0]) < 1000


def test_an_empty_file_is_the_defaults(write):
    for text in ("", "# nothing yet\n", "~"): assert load_config(write(text)) == Config()


def test_shipped_configs_are_in_no_other_folder():
    for name in ("elsewhere/quickstart", "configs/there/quickstart.yaml", "/quickstart"):
        assert "neither a file nor a shipped config" in lines(name)[0]


def test_no_such_config():
    line, = lines("quikstart")
    for word in ("quikstart", "did you mean quickstart?", "cifar10"): assert word in line


def test_difference():
    a, b = load_config("default"), load_config("default", ["--seed", "3"])
    assert config_diff(a, b) == {"training.seed": (0, 3)} and config_diff(a, a) == {}


def test_help_names_every_field():
    text = config_help()
    for section, cls in SECTIONS.items():
        assert f"\n{section}: {cls.__doc__}\n" in text
        for name, field in cls.model_fields.items():
            assert f"  --{section}.{name}  [" in text and f"      {field.description}; " in text
    assert "--training.learning_rate  [0.0002]\n      peak; a number > 0\n" in text
    assert "--sampling.eta" in (only := config_help(only="sampling")) and "--data." not in only


# -- short names

#: What each short name means. A new field may not take one of these; add a line for a new field.
SHORT = {
    "training": (
        "objective max_steps epochs batch_size accumulation ema_decay "
        "ema_sigma_rel ema_more label_dropout seed device precision channels_last "
        "compile keep_memory patience learning_rate optimizer beta1 beta2 weight_decay "
        "lr_schedule warmup_steps lr_step_size lr_gamma min_lr_ratio "
        "max_grad_norm"
    ),
    "data": (
        "dataset root download space image_size channels crop horizontal_flip "
        "mean std background bad_images if_changed validation_fraction train_size "
        "validation_size test_size data_seed num_workers caption_length caption_words "
        "image_condition image_condition_factor image_column label_column caption_column "
        "autoencoder latent_sample"
    ),
    "sampling": (
        "solver steps spacing eta churn churn_min churn_max churn_noise "
        "guidance_scale guidance_rescale guidance_interval clip_x0 "
        "dynamic_threshold sample_precision num_samples sample_batch_size"
    ),
    "diffusion": (
        "schedule timesteps beta_start beta_end betas zero_terminal_snr sigma_min "
        "sigma_max prediction sigma_data timestep_sampling timestep_mean "
        "timestep_std loss_weighting min_snr_gamma sigmoid_bias"
    ),
    "logging": (
        "output_dir log_every validate_every sample_every checkpoint_every "
        "evaluate_every evaluate_images keep_checkpoints keep_best trackers callbacks "
        "project progress"
    ),
    "model": (
        "name base_channels channel_multipliers num_res_blocks "
        "attention_resolutions attention_levels attention_heads attention_head_dim dropout "
        "norm norm_groups adaptive_norm resample num_classes conditions patch_size pad "
        "gradient_checkpointing"
    ),
}


def home(name):
    "The section that a short name leads to."
    values, errors = parse_overrides([f"--{name}=1"])
    assert not errors, errors
    return next(iter(values))


def test_short_names_keep_their_meaning():
    "Frozen, because scripts use them. All of them: a new field is added here, too."
    names = {name: section for section, words in SHORT.items() for name in words.split()}
    assert {name: home(name) for name in names} == names
    assert set(names) == {f for cls in SECTIONS.values() for f in cls.model_fields}


def test_a_new_section_or_network_takes_no_short_name(monkeypatch):
    class Later(BaseModel):
        dropout: float = 0.
        latents: int = 1
    class Toy(BaseModel):
        name: str = "toy"
        batch_size: int = 1
        dropout: float = 0.
    monkeypatch.setattr(module, "SECTIONS", {"later": Later} | SECTIONS)
    assert home("dropout") == "model" and home("latents") == "later"
    assert config_help().count("(long form only)") == 1
    assert "--later.dropout (long form only)" in config_help()
    monkeypatch.setitem(NETWORKS, "toy", Network(Toy, None))
    assert parse_overrides(["--batch_size", "2", "--dropout", "0.5", "--model.batch_size=3"],
                           "toy") == (
        {"training": {"batch_size": 2}, "model": {"dropout": 0.5, "batch_size": 3}}, [])
    assert set(PRECEDENCE) == set(Config.model_fields)


# -- registries

TIE = """
import importlib, json, sys
from diffusion_model.config import REGISTRIES
for r in REGISTRIES.values(): importlib.import_module(f"diffusion_model.{r.module}")
from diffusion_model.sampler import SOLVERS
there = {n: sys.modules[f"diffusion_model.{r.module}"] for n, r in REGISTRIES.items()}
tables = {n: list(getattr(there[n], r.table)) for n, r in REGISTRIES.items()}
print(json.dumps([tables, {n: list(s.options) for n, s in SOLVERS.items()}]))
"""


def test_shipped_names_are_the_registries():
    "In a fresh process, where nobody has registered anything."
    done = subprocess.run([sys.executable, "-c", TIE], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    tables, options = json.loads(done.stdout)
    assert {n: sorted(names)
            for n, names in tables.items()} == {n: sorted(r.shipped) for n, r in REGISTRIES.items()}
    assert {n: tuple(o) for n, o in options.items() if o} == SOLVER_OPTIONS


def literals(kind):
    "Every Literal in a type."
    if typing.get_origin(kind) is Literal: return [typing.get_args(kind)]
    return [found for part in typing.get_args(kind) for found in literals(part)]


def test_literals_are_what_their_readers_know():
    "No field is a list of names that somebody else keeps, too, except for these; and these agree."
    found = {f"{s}.{f}": x for s, c in SECTIONS.items() for f, field in c.model_fields.items()
             for x in literals(field.annotation)}
    assert found == {"model.name": ("unet",), "model.resample": ("conv", "pool", "residual"),
                     "model.norm": ("group", "layer", "rms", "instance", "batch"),
                     "data.crop": ("center", "random", "none"),
                     "data.bad_images": ("error", "skip"), "data.if_changed": ("error", "accept"),
                     "training.precision": ("auto", "fp32", "bf16", "fp16"),
                     "sampling.sample_precision": ("auto", "fp32", "bf16", "fp16")}
    assert set(found["model.name"]) == {n for n, network in NETWORKS.items()
                                        if network.config is SECTIONS["model"]}


def test_every_registry_is_that_of_a_field():
    for name, registry in REGISTRIES.items():
        section, field = name.split(".")
        assert registry in metadata(SECTIONS[section].__annotations__.get(field)
                                    or inherited(SECTIONS[section], field)), name
        default = SECTIONS[section].model_fields[field].get_default()
        assert set([default] if isinstance(default, str) else default) <= set(registry.shipped)


def inherited(cls, field):
    return next(c.__annotations__[field] for c in cls.__mro__
                if field in vars(c).get("__annotations__", {}))


def metadata(kind):
    return list(getattr(kind, "__metadata__", ())) + [m for part in typing.get_args(kind)
                                                      for m in metadata(part)]


@pytest.mark.parametrize("name", REGISTRIES)
def test_what_is_registered_is_accepted_and_listed(name, monkeypatch, write):
    "By file, command line and Python; in an error's words, and in the help. Before, it is not."
    registry, (section, field) = REGISTRIES[name], name.split(".")
    many = isinstance(SECTIONS[section].model_fields[field].get_default(), list)
    value = ["toy"] if many else "toy"
    assert any(f"{name}: found 'toy'; allowed: " in line
               for line in lines("default", [f"--{name}", "toy"]))
    table = dict.fromkeys([*registry.shipped, "toy"], SimpleNamespace(options=()))
    monkeypatch.setitem(sys.modules, f"diffusion_model.{registry.module}",
                        SimpleNamespace(**{registry.table: table}))
    for cfg in (load_config("default", [f"--{name}", "toy"]), load_config("default", {name: value}),
                load_config(write(f"{section}: {{{field}: {json.dumps(value)}}}"))):
        assert getattr(getattr(cfg, section), field) == value
    said = next(line for line in lines("default", [f"--{name}", "tyo"]) if line.startswith(name))
    names, _, own = said.rpartition("; ")
    assert names.endswith(", ".join([*registry.shipped, "toy"])), said
    assert own == f"one of your own is first entered in {registry.module}.{registry.table}"
    assert ", ".join([*registry.shipped, "toy"]) in config_help()
    with pytest.raises(ValueError, match="toy"):
        setattr(getattr(cfg, section), field, ["tyo"] if many else "tyo")


def test_a_solver_brings_its_options(monkeypatch):
    assert solver_options("ddim") == ("eta",) and solver_options("edm") == ("churn",)
    assert solver_options("euler") == ()
    solvers = {"ddim": SimpleNamespace(options=("eta",)),
               "toy": SimpleNamespace(options=("eta", "churn")), "edm": SimpleNamespace(options=()),
               "euler": SimpleNamespace(options=())}
    monkeypatch.setitem(sys.modules, "diffusion_model.sampler", SimpleNamespace(SOLVERS=solvers))
    cfg = load_config("default", ["--solver", "toy", "--eta", "0.5", "--churn", "3"])
    assert (cfg.sampling.eta, cfg.sampling.churn) == (0.5, 3)
    assert lines("default", ["--solver", "edm", "--churn", "3"]) == [
        "sampling.churn: found 3.0 with solver 'edm'; only 'toy' has it"]
    assert lines("default", ["--solver", "euler", "--eta", "0.5"]) == [
        "sampling.eta: found 0.5 with solver 'euler'; only 'ddim' and 'toy' have it"]


def test_a_registered_schedule_judges_its_own_steps(monkeypatch):
    table = dict.fromkeys([*REGISTRIES["diffusion.schedule"].shipped, "toy"])
    monkeypatch.setitem(sys.modules, "diffusion_model.scheduler", SimpleNamespace(SCHEDULES=table))
    load_config("default", {"schedule": "toy", "steps": 2000, "spacing": "leading",
                            "prediction": "x0", "loss_weighting": "edm"})


# -- networks

class ToyConfig(BaseModel):
    "A toy."
    name: Literal["toy"] = "toy"
    width: int = Field(4, ge=1, description="how wide")
    dropout: float = 0.5

    def check(self, shape):
        return [f"model.width: found {self.width} for {shape}"] if self.width > 99 else []


@pytest.fixture
def toy(monkeypatch): monkeypatch.setitem(NETWORKS, "toy", Network(ToyConfig, None))


def test_a_network_of_ones_own(toy, write, tmp_path):
    "Named in a file or on the command line, its section is its own; fields of the U-Net fall away."
    cfg = load_config("default", ["--width", "8", "--model.name", "toy", "--channels", "1"])
    assert cfg.model == ToyConfig(width=8) and cfg.model.dropout == 0.5  # not the U-Net's 0.1
    assert load_config(write("model: {name: toy, width: 8}\ndata: {channels: 1}")) == cfg
    text = "base: default\nmodel: {name: toy, width: 8}\ndata: {channels: 1}"
    assert load_config(write(text)) == cfg
    assert load_config(save_config(cfg, tmp_path/"c.yaml")) == cfg
    assert load_saved_config(save_config(cfg, tmp_path/"c.yaml"),
                             ["--width", "9"])[0].model.width == 9
    assert config_diff(load_config("default"), cfg)["model.base_channels"] == (128, None)
    assert config_diff(load_config("default"), cfg)["model.width"] == (None, 8)
    assert Config(model={"name": "toy", "width": 3}).model == ToyConfig(width=3)
    assert Config(model=ToyConfig(width=3)).model_dump()["model"] == {"name": "toy", "width": 3,
                                                                      "dropout": 0.5}
    assert load_config("default", {"model.name": "unet", "dropout": 0.3}).model.base_channels == 128
    assert "--model.width  [4]\n      how wide; a whole number >= 1" in config_help("toy")
    assert "--model.base_channels" not in config_help("toy")


def test_a_saved_toy_gets_its_own_new_fields(toy, write):
    saved = old() | {"model": {"name": "toy", "width": 8}}
    cfg, notes = load_saved_config(write(yaml.safe_dump(saved)))
    assert cfg.model == ToyConfig(width=8) and notes == ["model.dropout: not known then; 0.5"]


def test_a_base_with_another_network_keeps_the_classes(monkeypatch, write):
    class Classy(ToyConfig):
        num_classes: int = 0
    monkeypatch.setitem(NETWORKS, "toy", Network(Classy, None))
    assert load_config(write("base: quickstart\nmodel: {name: toy}")).model.num_classes == 8
    write("base: quickstart\nmodel: {name: toy, width: 7}", "a.yaml")
    assert load_config(write("base: a.yaml\nmodel: {dropout: 0.2}")).model == Classy(width=7,
                                                                                     dropout=0.2,
                                                                                     num_classes=8)
    assert load_config(write("base: a.yaml\nmodel: {name: unet}")).model.dropout == 0.1


@pytest.mark.parametrize("words, says", [
    ({"width": 0}, "model.width: found 0; allowed: a whole number >= 1"),
    ({"width": "many"}, "model.width: found 'many'"),
    ({"model.width": True}, "model.width: found True"),
    ({"width": 100}, "model.width: found 100 for (3, 32, 32)"),
    ({"width": 100, "channels": 1, "image_size": 16}, "model.width: found 100 for (1, 16, 16)"),
    ({"base_channels": 8}, "base_channels: no such section or field"),
    ({"model.widht": 8}, "model.widht: no such field; did you mean width?"),
])
def test_a_toy_network_is_refused_like_others(toy, words, says):
    assert any(line.startswith(says) for line in lines("default",
                                                       {"model.name": "toy"} | words)), words


def test_a_network_that_is_not_registered(write):
    "Known names, how to register one, and the other errors all the same; nothing is imported."
    for name in ("mamba", "os.path", "5"):
        found = lines("default", ["--model.name", name, "--lerning_rate", "1", "--image_size",
                                  "28"])
        assert len(found) == 2 and "did you mean training.learning_rate?" in found[1]
        for part in (f"model.name: found '{name}'", "known are unet",
                     "from diffusion_model.networks import NETWORKS",
                     f"NETWORKS['{name}'] = Network("):
            assert part in found[0]
    saved = yaml.safe_dump(old(model={"name": "mamba", "depth": 12}))
    with pytest.raises(ConfigError) as error: load_saved_config(write(saved))
    assert len(error.value.lines) == 1 and "NETWORKS['mamba']" in error.value.lines[0]
    with pytest.raises(ValueError, match="NETWORKS"): Config(model={"name": "mamba"})
    for name in ("[1]", "null", "{a: 1}"):
        assert "known are unet" in lines(write(f"model: {{name: {name}}}"))[0]


def test_a_network_without_a_name_in_its_config(monkeypatch):
    class Nameless(BaseModel):
        width: int = 4
    monkeypatch.setitem(NETWORKS, "toy", Network(Nameless, None))
    assert "Nameless has no field 'name'" in lines("default", ["--model.name", "toy"])[0]


def test_other_spaces_and_conditions_are_judged_by_others(toy, monkeypatch):
    "Only a space knows its shape; only a network without num_classes what it is conditioned on."
    monkeypatch.setitem(sys.modules, "diffusion_model.space",
                        SimpleNamespace(SPACES={"pixels": 1, "latents": 2}))
    load_config("default", {"space": "latents", "image_size": 28, "autoencoder": "outputs/a",
                            "clip_x0": "false"})
    load_config("default", {"model.name": "toy", "guidance_scale": 2., "dataset": "CIFAR10"})
    load_config("default", {"model.name": "toy", "label_dropout": 0., "guidance_scale": 2.})


def test_loading_a_config_imports_no_registry():
    code = ("import sys; from diffusion_model.config import *; "
            "load_config('quickstart'); config_help(); "
            "print(*[m.split('.')[-1] for m in sys.modules if 'diffusion_model.' in m], "
            "'torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    *loaded, torch = done.stdout.split()
    heavy = {"scheduler", "denoiser", "sampler", "optimizer", "objective", "dataset", "space"}
    assert torch == "False" and "networks" in loaded and not heavy & set(loaded), done


def test_saved_is_plain_yaml(tmp_path):
    saved = yaml.safe_load(save_config(Config(), tmp_path/"c.yaml").read_text())
    assert saved["training"]["learning_rate"] == 2e-4


# -- configs that older versions saved

def old(**sections):
    "What a run of an older version saved: sections as given, without the fields named '-'."
    values = Config().model_dump()
    for section, fields in sections.items():
        values.setdefault(section, {}).update(fields)
        for name in [k for k, v in fields.items() if v == "-"]: del values[section][name]
    return values


@pytest.fixture
def migrations(monkeypatch): return lambda table: monkeypatch.setattr(module, "MIGRATIONS", table)


def saved(write, values, overrides=()):
    return load_saved_config(write(yaml.safe_dump(values), "config.yaml"), overrides)


def test_a_config_of_this_version_migrates_to_itself(write):
    assert migrate_config(old()) == (old(), [])
    assert saved(write, old()) == (Config(), [])


def test_new_fields_get_defaults_and_stated_values_stay(write):
    cfg, notes = saved(write, old(training={"accumulation": "-"},
                                  sampling={"solver": "ddim", "steps": 7}))
    assert notes == ["training.accumulation: not known then; 1"]
    assert (cfg.training.accumulation, cfg.sampling.solver, cfg.sampling.steps) == (1, "ddim", 7)


def test_renamed_moved_and_dropped_fields(write, migrations):
    migrations({"training.lr": ("training.learning_rate", "said in full"),
                "gone.seed": ("training.seed", "moved"), "data.colour": (None, "nobody saw it")})
    values = old(training={"learning_rate": "-", "lr": 0.5, "seed": "-"}, gone={"seed": 3},
                 data={"colour": "blue"})
    cfg, notes = saved(write, values)
    assert (cfg.training.learning_rate, cfg.training.seed) == (0.5, 3)
    assert notes == ["training.lr: is training.learning_rate now (said in full); it was 0.5",
                     "gone.seed: is training.seed now (moved); it was 3",
                     "data.colour: is gone (nobody saw it); it was 'blue'"]
    # what was passed in is left as it is
    assert values["training"]["lr"] == 0.5


def test_a_field_renamed_twice_takes_both_steps(write, migrations):
    migrations({"training.a": ("training.b", "1"), "training.b": ("training.seed", "2")})
    cfg, notes = saved(write, old(training={"seed": "-", "a": 3}))
    assert cfg.training.seed == 3 and len(notes) == 2


def test_overrides_go_over_a_migrated_config(write):
    cfg, notes = saved(write, old(training={"accumulation": "-"}), ["--accumulation", "2"])
    assert cfg.training.accumulation == 2 and notes == ["training.accumulation: not known then; 1"]


def test_only_saved_configs_are_migrated(write, migrations):
    migrations({"training.lr": ("training.learning_rate", "said in full")})
    assert any("training.lr: no such field" in line for line in lines(write("training: {lr: 0.5}")))


@pytest.mark.parametrize("section, fields, says", [
    ("training", {"lerning_rate": 1}, "did you mean learning_rate?"), ("modle", {"x": 1}, "modle")])
def test_what_no_version_knew_stays_an_error(write, section, fields, says):
    with pytest.raises(ConfigError, match=says): saved(write, old(**{section: fields}))


@pytest.mark.parametrize("text", ["- 1", "training: 5", "training: [", "training: null"])
def test_a_damaged_saved_config_is_one_clear_error(write, text):
    with pytest.raises(ConfigError): load_saved_config(write(text))


def test_every_entry_leads_to_a_field_and_gives_a_reason():
    fields = {f"{s}.{f}" for s, c in SECTIONS.items() for f in c.model_fields}
    for name, (now, reason) in MIGRATIONS.items():
        assert name not in fields and reason, name
        assert now is None or now in fields | set(MIGRATIONS), name


@pytest.mark.parametrize("text, value", [
    ("true", True), ("True", True), ("TRUE", True), ("false", False), ("False", False),
    ("FALSE", False), ("null", None), ("~", None), ("", None), ("1e-4", 1e-4), (".5", 0.5),
    ("-2", -2), ("1_000", "1_000"), ("yes", "yes"), ("0x10", "0x10"), ("1:30", "1:30")])
def test_what_a_word_of_yaml_is(text, value):
    "YAML 1.2's words, not 1.1's: no `yes`, no base sixty; `1e-4` is a number."
    import yaml
    from diffusion_model.config import _Loader
    found = yaml.load(f"x: {text}", _Loader)["x"]
    assert found == value and type(found) is type(value)
