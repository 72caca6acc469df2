"""`make lock`: packages with their hashes, from pyproject.toml and the versions of constraints.txt.

All files are parts of one resolution, for Linux and Python 3.11 to 3.14, so that they fit together in any choice.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
HEAD = "# Made by `make lock`: packages with the hashes of their files. Do not edit.\n"
# Each file: what it is for, the extras of pyproject.toml that it serves, and the file that it builds on.
FILES = {
    "base": ("the engine and the experiments, on a CPU", ("experiments",), ()),
    "cuda12": ("JAX for CUDA 12", ("cuda12",), ("base",)),
    "cuda13": ("JAX for CUDA 13", ("cuda13",), ("base",)),
    "test": ("the tests, without torch", ("test",), ("base",)),
    "fuzz": ("`make fuzz`", ("test", "fuzz"), ("base", "test")),
}
AUDIT = ".requirements/audit.in"
TORCH = ("torch", "the reference that logits are compared with, as PyPI has it: built for CUDA")
OF_TORCH = re.compile(r"torch|triton|nvidia-.*|cuda-.*")  # what a build for CPUs does without
# What holds wherever a file is used, and is left out of markers: `environments` of pyproject.toml.
EVERYWHERE = {
    "python_full_version < '3.15'",
    "platform_machine == 'x86_64'",
    "platform_python_implementation == 'CPython'",
    "implementation_name != 'PyPy'",
    "sys_platform == 'linux'",
}

Blocks = dict[str, list[str]]


def resolved(*inputs: str, within: Blocks | None = None) -> Blocks:
    """The lines of each package's versions, with their hashes, by name. `inputs` are arguments of uv.

    `within`: a resolution of which this one is a part.
    """
    fixed = ["--universal", "--python-version", "3.11", "--generate-hashes", "--no-annotate", "--no-header"]
    with tempfile.TemporaryDirectory() as folder:
        made, known = Path(folder) / "made.txt", Path(folder) / "known.txt"
        known.write_text("\n".join(block for blocks in (within or {}).values() for block in blocks))
        uv = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", *fixed, "--output-file", str(made)]
        subprocess.run([*uv, "--constraint", "constraints.txt", "--constraint", known, *inputs], check=True, cwd=ROOT)
        found: Blocks = {}
        for block in re.split(r"\n(?=\S)", made.read_text().strip()):
            found.setdefault(block.partition("==")[0], []).append(block)
        return found


def of_project(*extras: str, within: Blocks | None = None) -> Blocks:
    """The packages of the project with these extras, and of what builds it."""
    with tempfile.NamedTemporaryFile("w", suffix=".in") as build:
        build.write("\n".join(PROJECT["build-system"]["requires"]))
        build.flush()
        chosen = [part for extra in extras for part in ("--extra", extra)]
        return resolved("pyproject.toml", build.name, *chosen, within=within)


def main() -> None:
    """Write all files."""
    together = of_project(*(extra for _, extras, _ in FILES.values() for extra in extras))
    names = {name: set(of_project(*extras, within=together)) for name, (_, extras, _) in FILES.items()}
    gpu = {name for name in names["test"] if OF_TORCH.fullmatch(name)}
    for name, (purpose, _, below) in FILES.items():
        mine = names[name].difference(*(names[other] for other in below)) - (gpu if "test" in (name, *below) else set())
        write(name, purpose, below[-1:], {package: together[package] for package in mine})
    write(TORCH[0], TORCH[1], ("test",), {package: together[package] for package in gpu})
    write("audit", "`make audit`, `sbom`, `lock`, `lint-deploy`, in an environment of their own", (), resolved(AUDIT))


def write(name: str, purpose: str, below: Sequence[str], blocks: Blocks) -> None:
    """Write one file."""
    lines = [f"{HEAD}# For {purpose}, on Linux.", *(f"--requirement {other}.txt" for other in below)]
    lines += [without_everywhere(block) for package in sorted(blocks) for block in blocks[package]]
    (FOLDER / f"{name}.txt").write_text("\n".join(lines) + "\n")


def without_everywhere(block: str) -> str:
    """A package's lines without the conditions that always hold."""
    first, end, hashes = block.partition(" \\\n")
    package, _, marker = first.partition(" ; ")
    kept = " and ".join(each for each in marker.split(" and ") if each and each not in EVERYWHERE)
    return f"{package} ; {kept}{end}{hashes}" if kept else f"{package}{end}{hashes}"


if __name__ == "__main__":
    main()
