"Config files, overrides and what is said when they are wrong."
import pytest
import yaml

import diffusion_model.config as module
from diffusion_model.config import (MIGRATIONS, SECTIONS, Config, ConfigError, config_diff,
                                    config_help, find_config, list_configs, load_config,
                                    load_saved_config, migrate_config, save_config)


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


def test_shipped_are_five():
    assert list_configs() == ["cifar10", "default", "fashion_mnist", "image_folder", "quickstart"]
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
    (["--timesteps", "30", "--steps", "40"], "at most diffusion.timesteps = 30"),
    (["--eta", "0.5", "--solver", "euler"], "only 'ddim' has it"),
    (["--num_classes", "7"], "CIFAR10 has 10 classes"),
    (["--guidance_scale", "2"], "model.num_classes > 0"),
    (["--dataset", "shapes", "--train_size", "5"], "training.batch_size"),
])
def test_refused(words, says):
    assert any(says in line for line in lines("default", words)), lines("default", words)


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


def test_a_circle_of_bases(write):
    write("base: b.yaml", "a.yaml")
    assert "cannot be its own base" in lines(write("base: a.yaml", "b.yaml"))[0]


def test_no_such_config():
    line, = lines("quikstart")
    for word in ("quikstart", "did you mean quickstart?", "cifar10"): assert word in line


def test_difference():
    a, b = load_config("default"), load_config("default", ["--seed", "3"])
    assert config_diff(a, b) == {"training.seed": (0, 3)} and config_diff(a, a) == {}


def test_help_names_every_field():
    text = config_help()
    for section, cls in Config.model_fields.items():
        for field in cls.annotation.model_fields: assert f"--{section}.{field}" in text


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
