"""The rules that hold the house up, checked: layers, file sizes, names, links, exports, and a start without torch."""

from __future__ import annotations

import ast
import functools
import graphlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each room, a module or folder directly under compress/ or one of the two in training/, imports only itself and what
# stands before it. ARCHITECTURE.md has a sentence for each.
ROOMS = (
    "errors", "progress", "files", "records", "lowrank", "options", "quant",
    "allocation", "graph", "kernels",
    "models", "calib", "data", "exporters", "sparse", "transform",
    "intake", "runtime", "training", "proof", "measure", "distillation", "training/sparse",
    "plans", "streaming", "pipeline", "training/lowrank", "search",
    "api", "__init__", "cli", "__main__",
)  # fmt: skip
# `ls compress`: a newcomer reads the list in one look.
MOST_ENTRIES = 32

# Rooms that may name a method's module; everyone else goes through compress.quant.methods.
ROOMS_WITH_METHODS = {"quant", "calib"}
# The rooms where Triton may be imported, and the modules in them that must stay importable without it.
TRITON_ROOMS = {"kernels"}
TRITON_FREE = {"compress.kernels.table", "compress.kernels.dispatch"}

MAX_LINES = 400
NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc", "core"}
LINKS = {"compress/kernels": "../kernels", "compress/calib": "../calib"}
HEAVY = {"torch", "onnxruntime", "onnx", "onnxscript", "triton"}
PACKAGE_FOLDERS = ("compress", "kernels", "calib")
ALL_FOLDERS = (*PACKAGE_FOLDERS, "tests", "benchmarks", "examples")


def python_files(*folders: str) -> list[Path]:
    """Every .py file under ``folders``, relative to the checkout, each once: those behind a link are left out."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(path.relative_to(ROOT) for path in found if path.resolve() == path)


def module_name(path: Path) -> str:
    """``kernels/table.py`` -> ``compress.kernels.table``; ``compress/graph/__init__.py`` -> ``compress.graph``."""
    parts = path.with_suffix("").parts
    parts = parts if parts[0] == "compress" else ("compress", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def room_of(module: str) -> str:
    """``compress.graph.traced`` -> ``graph``; of ``compress.training.sparse.job`` ``training/sparse``."""
    _, *rest = module.split(".")
    inner = "/".join(rest[:2])
    return inner if inner in ROOMS else rest[0] if rest else "__init__"


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything ``path`` imports, also inside functions; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


MODULES = {module_name(path): path for path in python_files(*PACKAGE_FOLDERS)}


def our_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Like :func:`imports_of`, only modules of this package: ``compress.graph.traced.trace`` is cut to the module."""
    for line, name in imports_of(path):
        if name.split(".")[0] == "compress":
            while name not in MODULES and "." in name:
                name = name.rpartition(".")[0]
            yield line, name


def report(problems: list[str]) -> None:
    """Fail with every problem at once, one a line."""
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def test_every_room_has_its_place_in_the_order() -> None:
    unknown = {room_of(module): path for module, path in MODULES.items() if room_of(module) not in ROOMS}
    report(
        [
            f"{path}: compress/{room} is new: decide what it stands on, and give it a place in ROOMS"
            for room, path in unknown.items()
        ]
    )
    assert set(ROOMS) <= {room_of(module) for module in MODULES}


@pytest.mark.slow
def test_a_room_imports_only_what_stands_before_it() -> None:
    place = {room: number for number, room in enumerate(ROOMS)}
    report(
        [
            f"{path}:{line}: {room_of(module)} may not import {name}: in ROOMS {room_of(name)} stands behind it"
            for module, path in MODULES.items()
            for line, name in our_imports(path)
            if place[room_of(name)] > place[room_of(module)]
        ]
    )


def test_the_first_look_shows_few_names_and_each_says_what_it_is() -> None:
    entries = {path.name for path in (ROOT / "compress").iterdir()} - {"__pycache__"}
    assert len(entries) <= MOST_ENTRIES, sorted(entries)
    problems = []
    for folder in sorted({path.parent for path in python_files("compress")} - {Path("compress")}):
        if not (ROOT / folder / "__init__.py").is_file():
            problems.append(f"{folder} has no __init__.py: it says in one line what the room is for")
        elif len((ast.get_docstring(parse(folder / "__init__.py")) or "\n").splitlines()) != 1:
            problems.append(f"{folder}/__init__.py: its docstring is one line: what the room is for")
    report(problems)


def test_no_public_name_is_a_modules() -> None:
    """Importing a submodule puts it into its package under its name, in the place of a function of that name."""
    import compress

    report([f"compress.{name} is a public name and a room" for name in compress.__all__ if name in ROOMS])


@pytest.mark.slow
def test_imports_form_no_cycle() -> None:
    graph = {module: {name for _, name in our_imports(path)} - {module} for module, path in MODULES.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("modules import each other in a circle: " + " <- ".join(error.args[1]), pytrace=False)


@pytest.mark.slow
def test_methods_are_reached_through_their_table() -> None:
    table = parse(MODULES["compress.quant.methods"])
    rows = {node.value for node in ast.walk(table) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    methods = {row.partition(":")[0] for row in rows if re.fullmatch(r"compress[\w.]+:\w+", row)}
    assert methods, "compress/quant/methods.py holds no row of the form 'compress.module:object'"
    report(
        [
            f"{path}:{line}: {name} is a method: take it from compress.quant.methods with resolve"
            for module, path in MODULES.items()
            for line, name in our_imports(path)
            if name in methods and room_of(module) not in ROOMS_WITH_METHODS
        ]
    )


@pytest.mark.slow
def test_triton_only_in_kernel_files() -> None:
    report(
        [
            f"{path}:{line}: triton may be imported only inside a kernel file: elsewhere there may be no GPU"
            for module, path in MODULES.items()
            for line, name in imports_of(path)
            if name.split(".")[0] == "triton" and (room_of(module) not in TRITON_ROOMS or module in TRITON_FREE)
        ]
    )


@pytest.mark.slow
def test_imports_are_absolute_and_full() -> None:
    report(
        [
            f"{path}:{line}: write compress.{name}: another project owns the bare name"
            if not name.startswith(".")
            else f"{path}:{line}: relative import; write the full name, so that a search finds it"
            for path in python_files(*ALL_FOLDERS)
            for line, name in imports_of(path)
            if name.startswith(".") or name.split(".")[0] in {"kernels", "calib"}
        ]
    )


def test_files_are_short_and_named() -> None:
    problems = []
    for path in python_files(*ALL_FOLDERS):
        lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            problems.append(f"{path} has {lines} lines, more than {MAX_LINES}: which two things is it?")
        if nameless := NAMELESS & {path.stem, *path.parent.parts}:
            problems.append(f"{path}: {nameless.pop()!r} says nothing; name it after what it holds")
    report(problems)


def all_order(name: str) -> tuple[int, list[int | str]]:
    """Sort key of ``__all__`` as ruff's RUF022 has it: CONSTANTS, Classes, functions, numbers by value."""
    kind = 0 if len(name) > 1 and name.isupper() else 1 if name[0].isupper() else 2
    return kind, [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]


def defined_names(tree: ast.Module) -> set[str]:
    """Names bound at the top level, also inside ``if`` and ``try``."""
    names = set()
    for node in tree.body:
        for inner in ast.walk(node) if isinstance(node, ast.If | ast.Try) else [node]:
            match inner:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    names.add(name)
                case ast.Assign(targets=targets):
                    names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
                case ast.AnnAssign(target=ast.Name(id=name)):
                    names.add(name)
                case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                    names |= {(alias.asname or alias.name).split(".")[0] for alias in aliases}
    return names


@pytest.mark.slow
def test_all_is_present_sorted_and_defined() -> None:
    problems = []
    for module, path in MODULES.items():
        tree = parse(path)
        # Commands and `python -m` are run, not imported; a folder's __init__ may be nothing but its docstring.
        if room_of(module) in {"cli", "__main__"} or len(tree.body) <= 1:
            continue
        values = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
        if not values:
            problems.append(f"{path}: no __all__: say which names are public")
            continue
        public = ast.literal_eval(values[0])
        if public != sorted(public, key=all_order):
            problems.append(f"{path}: sort __all__: {sorted(public, key=all_order)}")
        # The package resolves its names on first use; test_package_resolves_its_names covers it.
        if module != "compress.__init__":
            problems += [f"{path}: __all__ names {name}, not defined" for name in set(public) - defined_names(tree)]
    report(problems)


def test_package_resolves_its_names() -> None:
    import compress

    assert [name for name in compress.__all__ if not hasattr(compress, name)] == []


def test_version_is_what_the_project_and_the_command_say() -> None:
    import compress

    assert compress.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    said = subprocess.run([sys.executable, "-m", "compress", "--version"], capture_output=True, text=True, timeout=60)
    assert said.stdout == f"compress {compress.__version__}\n"


def test_package_has_the_types_of_its_names_for_whoever_imports_it() -> None:
    """Each name's home is stated twice, once for type checkers; the two must be one."""
    from compress import _HOMES

    tree = parse(Path("compress/__init__.py"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name))
    stated = {
        alias.name: node.module for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert stated == _HOMES


@pytest.mark.parametrize("link", LINKS)
def test_link_resolves(link: str) -> None:
    path = ROOT / link
    assert path.is_symlink(), f"{link} must be a symbolic link; was the project unpacked without link support?"
    assert path.readlink() == Path(LINKS[link])
    assert path.is_dir(), f"{link} points nowhere"


@pytest.mark.parametrize("folder", ["kernels", "calib", "tests"])
def test_folder_is_no_package(folder: str) -> None:
    # With one, `import kernels` from the checkout would find ours and break another project's package of that name.
    assert not list((ROOT / folder).rglob("__init__.py"))


def test_changelog_starts_with_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    heading = re.search(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heading, "CHANGELOG.md has no heading of the form '## [1.2.3] - date'"
    assert heading[1] == version


COMPLETION = {"_COMPRESS_COMPLETE": "complete_bash", "COMP_WORDS": "compress quantize --over", "COMP_CWORD": "2"}


@pytest.mark.slow(cases=1)
@pytest.mark.parametrize(
    ("arguments", "own", "said"),
    [
        (["--help"], {}, "quantize"),
        (["quantize", "--help"], {}, "--bits"),
        (["--version"], {}, "compress "),
        (
            ["--show-completion", "bash"],
            {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
            "_COMPRESS_COMPLETE=complete_bash",
        ),
        ([], COMPLETION, "--overwrite\n"),
    ],
    ids=["help", "help of a verb", "version", "completion's script", "completion"],
)
def test_what_is_asked_in_passing_imports_nothing_heavy(arguments: list[str], own: dict[str, str], said: str) -> None:
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "compress", *arguments],
        cwd=ROOT,
        env=os.environ | own,
        capture_output=True,
        text=True,
        timeout=60,
    )
    # Each import logs one line, "import time: self | cumulative | module"; the rest is the program's own.
    log = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    errors = [line for line in run.stderr.splitlines() if not line.startswith("import time:")]
    assert run.returncode == 0, "\n".join(errors)
    assert said in run.stdout
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in log}
    assert "compress" in imported, "the import log is empty: the test would pass whatever was imported"
    assert imported & HEAVY == set(), "imported before any work was asked for; import it inside the function"
