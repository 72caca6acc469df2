"""The house rules that a machine can hold: who may import whom, how long a file may be, and what READMEs may name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", *sorted(ROOT.glob("[!.]*/**/*.md")), *sorted((ROOT / ".github").glob("*.md"))]
PROJECT = ("model", "cache", "serve", "experiments")
OURS = (*PROJECT, "tests", "notebooks")

# What each wing may import of the others. The longest prefix of a module's name says which wing it belongs to.
MAY_IMPORT: dict[str, set[str]] = {
    "model": {"model.formats"},
    "model.formats": {"model.config"},
    "cache": set(),
    "serve.limits": set(),
    "serve.api": {"serve.limits"},
    "serve.rules": {"serve.api", "serve.limits"},
    "serve.formats": {"serve.api"},
    "serve.prompt": {"cache", "model.config", "model.formats", "serve.api", "serve.formats", "serve.limits"},
    "serve.diagnosis": {"cache.radix_tree", "serve.api", "serve.limits", "serve.prompt", "serve.rules"},
    "serve.cost": {"model.config"},
    "serve.router": {"serve.cost"},
    "serve.engine": {"model", "cache", "serve.cost"},
    "serve.audit": {"model", "cache", "serve.cost", "serve.engine", "serve.limits", "serve.web.keys"},
    "serve.web": {"cache.sizes", "serve.api", "serve.diagnosis", "serve.limits", "serve.rules"},
    "serve.proxy": {
        "serve.api", "serve.cost", "serve.diagnosis", "serve.limits", "serve.prompt", "serve.router", "serve.rules",
        "serve.web",
    },
    "serve.server": {
        "model", "cache", "serve.api", "serve.audit", "serve.cost", "serve.diagnosis", "serve.engine",
        "serve.formats", "serve.limits", "serve.prompt", "serve.rules", "serve.web",
    },
    "serve.cluster": {
        "model", "cache", "serve.cost", "serve.engine", "serve.limits", "serve.prompt", "serve.router", "serve.server",
        "serve.web",
    },
    "serve": {"model", "cache", "serve"},
    "experiments.harness": set(),
    "experiments.workloads": {"model", "experiments.harness"},
    "experiments.sweep": {"model", "cache", "serve", "experiments.harness", "experiments.workloads"},
    "experiments.replay": {
        *("model", "cache", "serve"),
        *("experiments.harness", "experiments.workloads", "experiments.routing"),
    },
    "experiments.wild": {"cache", "serve", "experiments.harness", "experiments.workloads"},
    "experiments.routing": {"cache", "serve", "experiments.harness", "experiments.workloads"},
    "experiments.gpu": {"model", "cache", "serve", "experiments.harness", "experiments.workloads"},
    "experiments.bench": {
        *("model", "cache", "serve"),
        *("experiments.harness", "experiments.workloads", "experiments.routing"),
    },
    "experiments.quality": {
        *("model", "cache", "serve"),
        *("experiments.harness", "experiments.workloads", "experiments.bench"),
    },
    "experiments.soak": {"model", "cache", "serve", "experiments.harness", "experiments.workloads"},
    "experiments": {"model", "cache", "serve", "experiments"},
}  # fmt: skip

# What is in tests/ and mirrors no wing.
OTHER_TESTS = {"helpers", "clients", "notebooks"}
# A name in backticks is taken for a file or a folder of ours if it ends like one.
NAMED_FILE = re.compile(r"`([\w.*/-]+(?:\.(?:py|md|cc|h|toml|jinja|html|js|css)|/))`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"python3? -m ([\w.]+)")

MOST_LINES = 400
# Longer files, each with its reason.
LONG_FILES: dict[str, str] = {}


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


def unknown_paths(readme: Path) -> Iterator[str]:
    """What a README links or names as a file or folder of ours, and is not there."""
    text = readme.read_text(encoding="utf-8")
    for target in LINK.findall(text):
        path = target.partition("#")[0]
        if path and ":" not in path and not (readme.parent / path).exists():
            yield target
    for name in NAMED_FILE.findall(text):
        # As seen from the README or the root, or the end of a path, such as `steps.py` of serve/engine/steps.py.
        places = [readme.parent.glob(name), ROOT.glob(name), *(ROOT.glob(f"{top}/**/{name}") for top in OURS)]
        if not name.startswith(("/", ".cache")) and not any(any(place) for place in places):
            yield name


def is_runnable(module: str) -> bool:
    """Whether `python -m` finds this module: it is a file, or a package with a `__main__`."""
    try:
        spec = find_spec(module)
        return spec is not None and not (spec.submodule_search_locations and find_spec(f"{module}.__main__") is None)
    except ModuleNotFoundError:
        return False


def is_one_sentence(text: str | None) -> bool:
    """Whether a text is a sentence, and one line of a file."""
    return bool(text) and text.endswith(".") and "\n" not in text and ". " not in text


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


@pytest.mark.parametrize("wing", MAY_IMPORT)
def test_a_wing_begins_by_saying_in_one_sentence_what_it_is_for(wing):
    text = (ROOT / wing.replace(".", "/") / "__init__.py").read_text(encoding="utf-8")
    found = ast.get_docstring(ast.parse(text))
    first = (found or "").split("\n\n")[0]
    assert is_one_sentence(first), f"{wing}/__init__.py begins with {first!r}, expected one sentence on a line"


def test_tests_mirror_the_wings():
    folders = {path.parent.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    folders -= {".", *OTHER_TESTS}
    unknown = {folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()}
    assert not unknown, "tests/ has folders that are no packages of the project: move their files to the wing they test"
    missing = {wing for wing in MAY_IMPORT if wing.replace(".", "/") not in folders}
    assert not missing, "wings without a folder in tests/"


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_readme_names_is_there(readme):
    assert not [*unknown_paths(readme)], "no such file: say where it is now"
    commands = COMMAND.findall(readme.read_text(encoding="utf-8"))
    assert not [module for module in commands if not is_runnable(module)], "no such module: say which runs now"


def test_the_test_of_readmes_sees_what_is_not_there(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("[a](none.md) `serve/none.py` `steps.py` `engine/` [b](https://x.org/y) `python -m serve.none`")
    assert [*unknown_paths(readme)] == ["none.md", "serve/none.py"]
    assert is_runnable("serve")
    assert is_runnable("experiments.bench.proxy")
    assert not is_runnable("serve.none")
    assert not is_runnable("serve.engine")


def test_the_test_of_circles_sees_one(monkeypatch):
    circle = {"a": frozenset({"b"}), "b": frozenset({"c"}), "c": frozenset({"b"})}
    monkeypatch.setattr(f"{__name__}.imports", lambda: circle)
    with pytest.raises(AssertionError, match=r"\['a', 'b', 'c'\]"):
        test_no_modules_import_each_other_in_a_circle()


def test_the_test_of_imports_sees_a_wrong_one(monkeypatch):
    monkeypatch.setattr(f"{__name__}.imports", lambda: {"serve.proxy.app": frozenset({"serve.engine.engine"})})
    with pytest.raises(AssertionError, match=r"serve\.proxy\.app imports serve\.engine\.engine"):
        test_a_wing_imports_what_the_table_allows()
