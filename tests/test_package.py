"The package from outside: quick to import, names at hand, the old and the new command."
import ast, os, re, subprocess, sys
from pathlib import Path

import pytest
import yaml

import diffusion_model
from diffusion_model.config import list_models

PACKAGE = Path(diffusion_model.__file__).parent
MODULES = sorted(p for p in PACKAGE.glob("*.py") if p.name not in ("_modidx.py", "_site.py"))


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
    with pytest.raises(AttributeError): diffusion_model._check_finite  # of generation


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
                                     "diffusion-sample", "diffusion-evaluate"])
def test_commands_are_installed(command):
    done = subprocess.run([Path(sys.executable).parent/command, "--help"], capture_output=True,
                          text=True)
    assert done.returncode == 0 and "usage" in done.stdout


def public_functions(path):
    "(name, definition) of the public functions of a module, and of its public classes."
    for node in ast.parse(path.read_text()).body:
        public = not getattr(node, "name", "_").startswith("_")
        if isinstance(node, ast.FunctionDef) and public: yield node.name, node
        if not isinstance(node, ast.ClassDef) or not public: continue
        for x in node.body:
            if isinstance(x, ast.FunctionDef) and (x.name == "__init__" or x.name[0] != "_"):
                yield f"{node.name}.{x.name}", x


@pytest.mark.parametrize("path", MODULES, ids=[p.stem for p in MODULES])
def test_public_arguments_are_annotated(path):
    "The package says that it is typed (py.typed): so every public argument says what it takes."
    for name, f in public_functions(path):
        every = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
        bare = [a.arg for a in every if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{path.name}: {name}: annotate {bare}"


def test_package_says_that_it_is_typed(): assert (PACKAGE/"py.typed").is_file()


def test_the_wheel_has_the_shipped_models(wheel):
    def files(top): return {p.relative_to(top): p.read_bytes() for p in top.rglob("*.*")}
    ours, theirs = files(PACKAGE/"models"), files(wheel/"diffusion_model"/"models")
    assert ours and ours == theirs


OFFLINE = """
import socket, sys
def refuse(*_, **__): raise AssertionError("something asks the network")
socket.socket.connect = socket.getaddrinfo = refuse
from diffusion_model.cli import sample_command
code = sample_command(["--checkpoint", sys.argv[1], "--output_dir", "drawn"])
import diffusion_model
from pathlib import Path
status = Path("/proc/self/status")  # ru_maxrss begins with what the parent had
lines = status.read_text().splitlines() if status.is_file() else []
most = sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))*1024
print(code, diffusion_model.__file__, most)
"""


@pytest.mark.parametrize("name", list_models())
def test_a_shipped_model_draws_64_from_the_wheel(name, wheel, tmp_path):
    "In an empty folder, offline, and in less than 1.5 GB, the libraries' own included."
    done = subprocess.run([sys.executable, "-c", OFFLINE, name], cwd=tmp_path, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(wheel)})
    assert done.returncode == 0, done.stderr
    code, path, most = done.stdout.splitlines()[-1].split()
    assert code == "0" and Path(path).is_relative_to(wheel), done.stderr
    assert len([*(tmp_path/"drawn").glob("0*.png")]) == 64
    assert int(most) < 1.5e9, f"{int(most)/1e9:.2f} GB"
    if sys.platform == "linux": assert int(most) > 1e8, "the memory was not measured"


ROOT = PACKAGE.parent
needs_checkout = pytest.mark.skipif(not (ROOT/"CITATION.cff").is_file(), reason="no checkout")


@needs_checkout
def test_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT/"CITATION.cff").read_text())
    assert citation["version"] == diffusion_model.__version__
    assert {"cff-version", "title", "authors", "message"} <= set(citation)


@needs_checkout
def test_changelog_has_this_version():
    text = (ROOT/"CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text and f"## [{diffusion_model.__version__}]" in text


@needs_checkout
def test_hooks_run_what_is_there():
    "Each hook of pre-commit is a command that the environment has, or a script of ours."
    hooks = yaml.safe_load((ROOT/".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert {"nbdev-clean", "nbdev-export"} <= {h["id"] for h in hooks}
    for hook in hooks:
        command, *rest = hook["entry"].split()
        assert (Path(sys.executable).parent/command).exists(), hook["entry"]
        assert all((ROOT/x).is_file() for x in rest if x.endswith(".py")), hook["entry"]
        assert re.search(hook.get("files", ""), "nbs/00_tour.ipynb")
