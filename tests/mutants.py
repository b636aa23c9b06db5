"""Small mistakes, planted one at a time: do the notebooks and the tests notice?

Each mistake of tests/mutants/MODULE.txt is a piece of text and what stands there instead. It is
written into the module *and* the exported cell of its notebook, in a copy of the project, and then
the notebook is run, and where it notices nothing, the module's tests. What fails or hangs has
noticed. In parts 0 and 1 (what diffusion is, and networks) the notebooks alone must notice 90 % of
the mistakes; notebooks and tests together 97 % of all.

    python tests/mutants.py [--only MODULE ...] [--jobs 2] [--resume FILE] [--notebooks-only] ...

An entry is a line `== name`, or `== glue: name` where the mistake is in what connects the parts
and not in a formula; then the old text, each line after `- `, and the new one, each line after
`+ `. The old text must stand once in the module and in one exported cell: it is found by its words,
so that a list survives edits; where it is not found, that is an error.
"""
import argparse, ast, hashlib, json, multiprocessing, os, queue, re, shutil, signal
import sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("nbs", "diffusion_model", "tests", "configs", "benchmarks", "pyproject.toml",
          "settings.ini", "Makefile", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LIMITS = {"notebook": 300, "pytest": 900}  # seconds; a mistake that hangs is noticed

# Which tests belong to a module, likely killers first. `test_MODULE.py` always belongs to it.
CORE = ["test_core.py"]
RUNS = ["test_training.py", "test_registries.py", "faults/test_numbers.py", "test_checkpoint.py",
        "test_cli.py", "faults/test_fields.py", "faults/test_saving.py", "faults/test_resume.py"]
TESTS = {
    "scheduler": CORE, "denoiser": CORE, "oracle": CORE, "guidance": CORE, "editing": CORE,
    "sampler": [*CORE, "test_parity.py"], "solvers": [*CORE, "test_parity.py"],
    "unet_config": ["test_config.py", "faults/test_fields.py", "test_unet.py"],
    "dit_config": ["test_dit.py"],
    "networks": ["test_config.py", "test_unet.py", "test_registries.py"],
    "config": ["test_shipped.py", "faults/test_fields.py", "test_cli.py"],
    "transforms": ["faults/test_images.py"],
    "dataset": ["test_sources.py", "faults/test_images.py"],
    "pixels": ["test_latents.py", "test_avatars.py"], "avatars": ["test_dataset.py"],
    "space": ["test_transforms.py", "test_registries.py", "test_cli.py", "faults/test_numbers.py"],
    "optimizer": ["test_training.py"], "ema": ["test_training.py"],
    "checkpoint": ["test_shipped.py", "faults/test_saving.py", "test_training.py"],
    "tracking": ["test_training.py", "test_cli.py", "faults/test_saving.py"],
    "processes": ["test_launchers.py", "test_training.py", "faults/test_numbers.py",
                  "faults/test_processes.py"],
    "objective": ["test_asking.py", *RUNS], "training": RUNS, "callbacks": RUNS,
    "generation": ["test_cli.py", *RUNS],
    "cli": ["test_shipped.py", "test_asking.py", "faults/test_fields.py", "faults/test_saving.py",
            "test_judge.py", "test_reconstructed.py"],
    "features": ["test_judge.py"], "report": ["test_judge.py", "test_reconstructed.py"],
    "judge": ["test_reconstructed.py"], "interop": ["test_reconstructed.py"],
}


class Mistake(NamedTuple):
    name: str
    module: str
    glue: bool      # in what connects the parts, not in a formula
    old: str
    new: str


class Place(NamedTuple):
    "Where a module comes from."
    module: Path
    notebook: Path
    part: int | None


def mistakes(folder: Path = ROOT/"tests"/"mutants") -> list[Mistake]:
    "All of the list."
    found = []
    for path in sorted(folder.glob("*.txt")):
        for entry in re.split(r"^== ", path.read_text(), flags=re.M)[1:]:
            name, *lines = entry.splitlines()
            old, new = ("\n".join(x[2:] for x in lines if x[:1] == sign) for sign in "-+")
            bad = [x for x in lines if x and not re.match(r"[-+#]( |$)", x)]
            if bad or not old or old == new: raise SystemExit(
                f"{path.name}: '{name}': each line begins with '- ' or '+ ', and old and new differ"
                + (f"; found {bad[0]!r}" if bad else ""))
            glue, name = name.startswith("glue: "), name.removeprefix("glue: ")
            found.append(Mistake(name, path.stem, glue, old, new))
    return found


def place(module: str, root: Path = ROOT) -> Place:
    "The module's file and notebook. Raises ValueError where one is missing."
    path = root/"diffusion_model"/f"{module}.py"
    if not path.is_file(): raise ValueError(f"there is no module {module}")
    name = re.search(r"File to edit: \S*?nbs/(\S+\.ipynb)", path.read_text())[1]
    part = re.match(r"(\d)\d_", name)
    return Place(path, root/"nbs"/name, int(part[1]) if part else None)


def plant(mistake: Mistake, root: Path = ROOT) -> dict[Path, str]:
    "{file: its text with the mistake}. Raises ValueError where the text does not stand once."
    where = place(mistake.module, root)
    text = where.module.read_text()
    times = text.count(mistake.old)
    if times != 1: raise ValueError(
        f"the text stands {times} times in {where.module.name}, not once")
    changed = text.replace(mistake.old, mistake.new)
    try: ast.parse(changed)
    except SyntaxError as error: raise ValueError(f"the mistake is no Python: {error}") from error
    book = json.loads(where.notebook.read_text())
    old, new = as_in_notebooks(mistake.old), as_in_notebooks(mistake.new)
    cells = [c for c in book["cells"] if c["cell_type"] == "code"
             and re.search(r"^#\| *exports?\b", "".join(c["source"]), re.M)
             and old in "".join(c["source"])]
    if len(cells) != 1: raise ValueError(
        f"the text stands in {len(cells)} exported cells of {where.notebook.name}, not in one")
    cells[0]["source"] = "".join(cells[0]["source"]).replace(old, new).splitlines(keepends=True)
    return {where.module: changed, where.notebook: json.dumps(book)}


def as_in_notebooks(text: str) -> str:
    "nbdev writes `from .unet import x` in a module for what is absolute in its notebook."
    text = re.sub(r"from \. import", "from diffusion_model import", text)
    return re.sub(r"from \.(\w)", r"from diffusion_model.\1", text)


def tests_of(module: str, root: Path = ROOT) -> list[Path]:
    "The test files of a module that are there; and those of mended faults that import it."
    names = [f"test_{module}.py", *TESTS.get(module, [])]
    found = [root/"tests"/n for n in names if (root/"tests"/n).is_file()]
    named = re.compile(rf"\bdiffusion_model(\.| import .*\b){module}\b")
    found += [p for p in sorted((root/"tests"/"mended").glob("test_*.py"))
              if named.search(p.read_text())]
    return list(dict.fromkeys(found))


# -- running. What every notebook and test imports is imported once, in a server that forks.
HEAVY = ["torch", "torchvision.transforms.v2", "matplotlib.pyplot", "nbdev.test", "pytest",
         "pydantic", "safetensors.torch", "torch.nn.parallel", "scipy.special", "hypothesis"]


def work(kind: str, files: list[str], root: str, log: str) -> None:
    "In a process of its own: run a notebook or tests; the exit code is 0 where all is well."
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2): os.dup2(output, stream)
    os.chdir(root)
    os.environ["PYTHONPATH"] = root
    sys.path[:0] = [root]
    multiprocessing.set_start_method(None, force=True)  # the usual one, as where they run alone
    if kind == "notebook":
        from nbdev.test import nbdev_test
        sys.exit(nbdev_test(*files, n_workers=0))
    import pytest
    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files])))


def look(kind: str, module: str, root: Path) -> tuple[bool, str]:
    "Whether the module's notebook, or one of its tests, fails or hangs; and its last words."
    files = [place(module, root).notebook] if kind == "notebook" else tests_of(module, root)
    if not files: return False, "there are no tests"
    log, server = root.parent/f"{kind}.log", multiprocessing.get_context("forkserver")
    process = server.Process(target=work, args=(kind, [str(f) for f in files], str(root), str(log)))
    process.start()
    process.join(LIMITS[kind])
    late = process.exitcode is None
    try: os.killpg(process.pid, signal.SIGKILL)  # what it started, too
    except ProcessLookupError: pass
    process.join()
    if late: return True, f"not at its end after {LIMITS[kind]} s"
    lines = [x.strip() for x in log.read_text(errors="replace").splitlines() if x.strip()]
    errors = [x for x in lines if re.match(r"(FAILED|ERROR|E  |[\w.]*(Error|Exit|Warning)\b)", x)]
    return process.exitcode != 0, (errors or lines or [""])[-1][:200]


def copy(folder: Path) -> Path:
    "A copy of the project to make mistakes in."
    root = folder/"diffusion_model"
    hidden = shutil.ignore_patterns("__pycache__", ".*", "*.log")
    for name in COPIED:
        source = ROOT/name
        if source.is_dir(): shutil.copytree(source, root/name, ignore=hidden)
        elif source.is_file(): shutil.copy(source, root)
    return root


class Bench:
    "Copies to work in, one for each job, and what was found until now."
    def __init__(self, folder: Path, jobs: int, memory: Path | None):
        self.copies, self.memory, self.root = queue.Queue(), memory, copy(folder/"as it is")
        for k in range(jobs): self.copies.put(copy(folder/str(k)))
        self.known = json.loads(memory.read_text()) if memory and memory.is_file() else {}

    def key(self, kind: str, module: str, mistake: Mistake | None) -> str:
        "The same for the same mistake in the same text under the same notebook or tests."
        where = place(module, self.root)
        cells = [c["source"] for c in json.loads(where.notebook.read_text())["cells"]
                 if c["cell_type"] == "code"]
        facts = [kind, mistake and (mistake.old, mistake.new), where.module.read_text(), cells]
        if kind == "pytest": facts += [p.read_text() for p in tests_of(module, self.root)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]

    def ask(self, kind: str, module: str, mistake: Mistake | None = None) -> dict:
        "Was it noticed? {noticed, why, seconds}; from memory where nothing has changed."
        key = self.key(kind, module, mistake)
        if key not in self.known:
            root, start = self.copies.get(), time.time()
            planted = plant(mistake, root) if mistake else {}
            old = {path: path.read_text() for path in planted}
            try:
                for path, text in planted.items(): path.write_text(text)
                noticed, why = look(kind, module, root)
            finally:
                for path, text in old.items(): path.write_text(text)
                self.copies.put(root)
            self.known[key] = {"name": mistake.name if mistake else "as it is", "module": module,
                               "kind": kind, "noticed": noticed, "why": why,
                               "seconds": round(time.time() - start)}
            self.keep()
        return self.known[key]

    def keep(self):
        if not self.memory: return
        draft = self.memory.with_suffix(".tmp")
        draft.write_text(json.dumps(dict(self.known), indent=1, ensure_ascii=False))
        draft.replace(self.memory)

    def both(self, mistake: Mistake, kinds: list[str], always: bool) -> dict:
        "{kind: noticed, or None where there was no need to look}."
        found = dict.fromkeys(("notebook", "pytest"))
        for kind in kinds:
            if always or not any(found.values()):
                found[kind] = self.ask(kind, mistake.module, mistake)["noticed"]
        return found


# -- the table
def share(rows: list, kinds: tuple) -> str:
    caught = sum(any(found.get(k) for k in kinds) for _, found in rows)
    return f"{caught} of {len(rows)}" + (f" ({caught/len(rows):.0%})" if rows else "")


def table(rows: list[tuple[Mistake, dict]], kinds: tuple) -> bool:
    "Print what was noticed; whether that is enough."
    word = {True: "yes", False: "NO", None: "-"}
    print(f"\n{'module':<12} {'notebook':<9} {'pytest':<7} mistake")
    for m, found in rows:
        print(f"{m.module:<12} {word[found.get('notebook')]:<9} {word[found.get('pytest')]:<7} "
              + ("(glue) " if m.glue else "") + m.name)
    print(f"\n{'module':<12} {'notebooks':<18} both")
    for module in dict.fromkeys(m.module for m, _ in rows):
        mine = [row for row in rows if row[0].module == module]
        print(f"{module:<12} {share(mine, ('notebook',)):<18} {share(mine, kinds)}")
    early = [row for row in rows if place(row[0].module).part in (0, 1)]
    glue = [row for row in rows if row[0].glue]
    print(f"\nparts 0 and 1, by notebooks alone: {share(early, ('notebook',))}; at least 90 %")
    print(f"glue, by {' and '.join(kinds)}: {share(glue, kinds)}")
    print(f"all, by {' and '.join(kinds)}: {share(rows, kinds)}; at least 97 %")
    survivors = [m for m, found in rows if not any(found.values())]
    if survivors: print("\nsurvivors:")
    for m in survivors: print(f"  tests/mutants/{m.module}.txt: {m.name}")
    alone = sum(bool(found["notebook"]) for _, found in early)
    enough = alone >= 0.9*len(early)
    return enough and ("pytest" not in kinds or len(rows) - len(survivors) >= 0.97*len(rows))


def lost(wanted: list[Mistake]) -> list[str]:
    "A sentence for each mistake whose text is not where it should be."
    lines = []
    for m in wanted:
        try: plant(m)
        except ValueError as error:
            lines.append(f"tests/mutants/{m.module}.txt: '{m.name}': {error}")
    return lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", metavar="MODULE", help="plant in these modules alone")
    add("--name", metavar="TEXT", help="plant only mistakes with this text in their name")
    add("--list", action="store_true", help="print the list, and plant nothing")
    add("--jobs", type=int, default=2, help="mistakes at once; default 2")
    add("--resume", type=Path, metavar="FILE", help="remember results there, and go on from them")
    add("--notebooks-only", action="store_true", help="leave the tests out")
    add("--both", action="store_true", help="run the tests even where the notebook has noticed")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    wanted = [m for m in mistakes() if not args.only or m.module in args.only]
    wanted = [m for m in wanted if not args.name or args.name in m.name]
    problems = lost(wanted)
    if args.list:
        for m in wanted: print(f"{m.module:<12} {'glue' if m.glue else '':<5} {m.name}")
        print(f"{len(wanted)} mistakes, {sum(m.glue for m in wanted)} of them in glue")
    if problems: print(*problems, f"{len(problems)} of {len(wanted)} are lost", sep="\n")
    if problems or args.list: return 2 if problems else 0
    from tqdm import tqdm
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1"}
    multiprocessing.set_forkserver_preload(HEAVY)
    kinds = ("notebook",) if args.notebooks_only else ("notebook", "pytest")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        bench = Bench(Path(folder), args.jobs, args.resume)
        asked = [(kind, module) for module in dict.fromkeys(m.module for m in wanted)
                 for kind in kinds]
        work = pool.map(lambda a: bench.ask(*a), asked)
        sound = list(tqdm(work, total=len(asked), desc="as it is"))
        broken = {a: answer["why"] for a, answer in zip(asked, sound) if answer["noticed"]}
        whole = {module: [k for k in kinds if (k, module) not in broken] for _, module in asked}
        work = pool.map(lambda m: bench.both(m, whole[m.module], args.both), wanted)
        rows = list(zip(wanted, tqdm(work, total=len(wanted), desc="planted")))
    enough = table(rows, kinds)
    for (kind, module), why in broken.items():
        print(f"{module}: left out its {kind}, which fails as it is: {why}")
    return 0 if enough and not broken else 1


if __name__ == "__main__": sys.exit(main())
