__version__ = "0.2.0"


def __getattr__(name):
    "Find `name` in the submodule that exports it: `import diffusion_model` itself loads nothing."
    from importlib import import_module
    from ._modidx import d
    for module, symbols in d["syms"].items():
        if name == module.rpartition(".")[2]: return import_module(module)
        if f"{module}.{name}" in symbols and not name.startswith("_"):
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    from ._modidx import d
    names = {s.split(".")[2] for symbols in d["syms"].values() for s in symbols}
    modules = {m.rpartition(".")[2] for m in d["syms"]}
    return sorted({"__version__"} | modules | {n for n in names if not n.startswith("_")})
