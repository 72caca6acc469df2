"""The house rules that a machine can hold: who may import whom, no import circle, and no file over 400 lines."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = ("model", "cache", "serve", "experiments")

# What each wing may import of the others. The longest prefix of a module's name says which wing it belongs to.
MAY_IMPORT: dict[str, set[str]] = {
    "model": set(),
    "cache": set(),
    "serve.limits": set(),
    "serve.api": {"serve.limits"},
    "serve.rules": {"serve.api", "serve.limits"},
    "serve.formats": {"serve.api"},
    "serve.prompt": {"cache", "serve.api", "serve.formats", "serve.limits"},
    "serve.diagnosis": {"cache.radix_tree", "serve.api", "serve.limits", "serve.prompt", "serve.rules"},
    "serve.engine": {"model", "cache"},
    "serve.audit": {"model", "cache", "serve.engine", "serve.limits"},
    "serve.web": {"serve.api", "serve.diagnosis", "serve.limits", "serve.rules"},
    "serve.proxy": {"serve.api", "serve.diagnosis", "serve.limits", "serve.prompt", "serve.rules", "serve.web"},
    "serve.server": {
        "serve.api", "serve.audit", "serve.diagnosis", "serve.engine", "serve.formats", "serve.limits", "serve.prompt",
        "serve.rules", "serve.web",
    },
    "serve": {"model", "cache", "serve"},
    "experiments.harness": set(),
    "experiments.workloads": {"experiments.harness"},
    "experiments.gpu": {"model", "serve", "experiments.harness", "experiments.workloads"},
    "experiments": {"model", "cache", "serve", "experiments"},
}  # fmt: skip

MOST_LINES = 400
# Longer files, each with its reason.
LONG_FILES = dict.fromkeys(
    (
        "experiments/bench/batching.py",
        "serve/__main__.py",
        "serve/api/messages.py",
        "serve/audit/auditor.py",
        "serve/diagnosis/divergence.py",
        "serve/engine/engine.py",
        "serve/engine/paging.py",
    ),
    "not divided yet",
)


def source_files() -> list[Path]:
    """Every Python file of the project, without tests and notebooks."""
    return sorted(path for top in PROJECT for path in (ROOT / top).rglob("*.py"))


def name_of(path: Path) -> str:
    """The dotted name of the module in a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports() -> dict[str, frozenset[str]]:
    """The project's modules that each module imports, wherever in its text, for type checkers only as well."""
    paths = {name_of(path): path for path in source_files()}
    found = {}
    for name, path in paths.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= (full & paths.keys()) or {node.module}
                if not full <= paths.keys():
                    named.add(node.module)
            elif isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
        found[name] = frozenset((named & paths.keys()) - {name})
    return found


def within(module: str, wing: str) -> bool:
    """Whether a module is a wing, or in it."""
    return module == wing or module.startswith(f"{wing}.")


def wing_of(module: str) -> str:
    """The wing that a module belongs to."""
    return max((wing for wing in MAY_IMPORT if within(module, wing)), key=len)


def test_a_wing_imports_what_the_table_allows():
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if wing_of(other) != wing_of(module)
        and not any(within(other, allowed) for allowed in MAY_IMPORT[wing_of(module)])
    ]
    assert not wrong, "\n".join(["not in MAY_IMPORT:", *sorted(wrong)])


def test_no_modules_import_each_other_in_a_circle():
    left = {module: set(others) for module, others in imports().items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"in a circle, or above one: {sorted(left)}"


def test_no_file_is_long_without_a_reason():
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in source_files()}
    long = {name for name, count in lines.items() if count > MOST_LINES}
    assert not long - LONG_FILES.keys(), f"over {MOST_LINES} lines: divide it, or give a reason in LONG_FILES"
    assert not LONG_FILES.keys() - long, "short enough by now: take it out of LONG_FILES"


def test_the_test_of_circles_sees_one(monkeypatch):
    circle = {"a": frozenset({"b"}), "b": frozenset({"c"}), "c": frozenset({"b"})}
    monkeypatch.setattr(f"{__name__}.imports", lambda: circle)
    with pytest.raises(AssertionError, match=r"\['a', 'b', 'c'\]"):
        test_no_modules_import_each_other_in_a_circle()


def test_the_test_of_imports_sees_a_wrong_one(monkeypatch):
    monkeypatch.setattr(f"{__name__}.imports", lambda: {"serve.proxy.app": frozenset({"serve.engine.engine"})})
    with pytest.raises(AssertionError, match=r"serve\.proxy\.app imports serve\.engine\.engine"):
        test_a_wing_imports_what_the_table_allows()
