"""What the documents say exists: files they lead to, headings, verbs and options of the command line, modules."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
_ROOMS = (ROOT / "kernels/README.md", ROOT / "calib/README.md", *ROOT.glob("compress/[!kc]*/README.md"))
_PAGES = (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *_ROOMS)
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in _PAGES)
# CHANGELOG.md speaks of what once was, CONTRIBUTING.md of files to come.
PRESENT = [name for name in DOCUMENTS if name not in ("CHANGELOG.md", "CONTRIBUTING.md")]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def headings(text: str) -> set[str]:
    """As anchors of links."""
    found = (line.lstrip("# ").lower() for line in text.splitlines() if line.startswith("#"))
    return {re.sub(r"[^\w -]", "", each).strip().replace(" ", "-") for each in found}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (ROOT / name).parent / path if path else ROOT / name
        assert linked.exists(), f"{name} leads to {target}"
        assert not anchor or anchor in headings(linked.read_text(encoding="utf-8")), f"{name} leads to {target}"


def test_every_guide_is_reached_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((docs/[^)#]+)", read("README.md")))
    assert linked == {name for name in DOCUMENTS if name.startswith("docs/")}


@pytest.fixture(scope="module")
def verbs() -> dict[str, set[str]]:
    """Options of every verb, ``sparse train`` among them, by its name."""
    from compress.cli.main import app

    found: dict[str, set[str]] = {}

    def walk(command: Any, name: str) -> None:
        for each, child in getattr(command, "commands", {}).items():
            walk(child, f"{name} {each}".strip())
        found[name] = {text for each in command.params for text in (*each.opts, *each.secondary_opts)} | {"--help"}

    walk(typer.main.get_command(app), "")
    return found


@pytest.mark.parametrize("name", PRESENT)
def test_options_and_verbs_exist(name: str, verbs: dict[str, set[str]]) -> None:
    text = read(name)
    known = set().union(*verbs.values())
    # Benchmarks have options of their own.
    said = re.sub(r"`python -m [^`]*`", "", text)
    unknown = {option for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", said) if option not in known}
    assert not unknown, f"{name} speaks of options that no verb has"
    for line in re.findall(r"^compress ([^#\n]+)", text, re.MULTILINE):
        words = line.split()
        verb = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in verbs), None)
        assert verb is not None, f"{name}: compress {line}"
        missing = {word.partition("=")[0] for word in words if word.startswith("--")} - verbs[verb]
        assert not missing, f"{name}: compress {verb} has no {missing}"


CODE = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("compress", "kernels", "calib", "tests", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if path.resolve() == path and path.name not in ("test_mutations.py", "test_documents.py")
)
_ROOM_NAMES = "|".join(sorted(path.name for path in (ROOT / "compress").iterdir() if path.is_dir()))
_FILE = re.compile(
    rf"(?<![\w./-])((?:compress|kernels|calib|tests|benchmarks|docs|examples|{_ROOM_NAMES})/[\w/]+\.(?:py|md))\b"
)


def test_files_that_code_and_documents_name_are_there() -> None:
    missing = [
        f"{name} names {path}"
        for name in (*PRESENT, *CODE)
        for path in _FILE.findall(read(name))
        if not ((ROOT / path).exists() or (ROOT / "compress" / path).exists())
    ]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("name", [each for each in PRESENT if each != "ARCHITECTURE.md"])
def test_modules_exist(name: str) -> None:
    for module in re.findall(r"`(?:python -m )?((?:compress|benchmarks)\.[a-z_.]+)", read(name)):
        assert _there(module.rstrip(".")), f"{name}: {module}"


def _there(name: str) -> bool:
    """Whether ``name`` is a module, or something in one."""
    module, _, inside = name.rpartition(".")
    try:
        if importlib.util.find_spec(name) is not None:
            return True
    except ModuleNotFoundError:  # what stands before the last dot is no package
        pass
    return bool(module) and _there(module) and hasattr(importlib.import_module(module), inside)
