"The package from outside: quick to import, names at hand, the old and the new command."
import subprocess, sys
from pathlib import Path

import pytest

import diffusion_model


def python(code, cwd):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, text=True, capture_output=True)


def test_import_loads_no_torch(tmp_path):
    done = python("import sys, diffusion_model; "
                  "print('torch' in sys.modules, diffusion_model.__version__)", tmp_path)
    assert done.stdout.split() == ["False", diffusion_model.__version__], done.stderr


def test_config_loads_no_torch(tmp_path):
    "A typo must be found quickly: reading a config imports nothing heavy."
    done = python("import sys; from diffusion_model.config import load_config; "
                  "load_config('quickstart'); "
                  "print('torch' in sys.modules)", tmp_path)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("name", [
    "create_network", "create_unet", "create_scheduler", "create_denoiser", "create_sampler",
    "create_dataset", "create_loader", "create_transform", "create_optimizer", "create_trackers",
    "load_config", "load_network", "load_denoiser", "Trainer", "UNet", "sample"])
def test_names_at_the_top(name):
    assert callable(getattr(diffusion_model, name)) and name in dir(diffusion_model)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'create_nothing'"):
        diffusion_model.create_nothing
    with pytest.raises(AttributeError): diffusion_model._check_sizes


def test_a_name_means_one_thing():
    from diffusion_model._modidx import d
    seen = {}
    for module, symbols in d["syms"].items():
        for symbol in symbols:
            name = symbol.removeprefix(module + ".")
            if "." in name or name.startswith("_"): continue
            assert name not in seen, f"{name} stands in {seen[name]} and {module}"
            seen[name] = module


@pytest.mark.parametrize("module, name", [("sampler", "sample"), ("unet", "UNet"),
                                          ("scheduler", "VPSchedule"),
                                          ("dataset", "draw_shapes"), ("training", "Trainer")])
def test_star_import_in_a_bare_script(module, name, tmp_path):
    done = python(f"from diffusion_model.{module} import *; print({name}.__name__)", tmp_path)
    assert done.stdout.strip() == name, done.stderr


@pytest.mark.parametrize("command", ["nbdev_test", "nbdev-test", "diffusion-train",
                                     "diffusion-sample"])
def test_commands_are_installed(command):
    done = subprocess.run([Path(sys.executable).parent/command, "--help"], capture_output=True,
                          text=True)
    assert done.returncode == 0 and "usage" in done.stdout
