"""Helpers of the notebooks: runs that are measured once and then read, and tables as text."""

from __future__ import annotations

import atexit
import io
import os
import shutil
import tempfile
import warnings
from pathlib import Path

from IPython.display import Image, display
from matplotlib.figure import Figure
from rich.console import Console

from experiments.harness.figures import DPI
from experiments.sweep import __main__ as sweeps
from experiments.sweep.config import points, read_config
from experiments.sweep.run_folder import RunError, load
from experiments.workloads.demo_model import write_demo_model

CONFIGS = Path("experiments/configs")
MODEL = Path(".cache/demo-model")  # the one that the configs name
# Set by tests: measure only as much as shows that everything runs.
SMOKE = os.environ.get("TOKENZERO_SMOKE") == "1"

# A kernel without widgets draws no progress bars; readers of the outputs need not know.
warnings.filterwarnings("ignore", message="IProgress not found")

# Plain text, so that a notebook's diff can be read.
console = Console(width=110, force_jupyter=False, color_system=None)
quiet = Console(quiet=True)  # for what would draw progress bars


def sweep(name: str) -> Path:
    """The folder of the run of `experiments/configs/NAME.toml`; measured now if it is not complete.

    Raises RunError if it cannot be measured. In a smoke run the folder is a copy, as figures are drawn into it.
    """
    config, folder = CONFIGS / f"{name}.toml", sweeps.RESULTS / name
    write_demo_model(MODEL, console=console)  # its shape is part of every fit
    wanted = read_config(config.read_bytes())
    measured = load(folder) if (folder / "measurements.jsonl").exists() else []
    missing = len(points(wanted)) * wanted.repeats - len(measured)
    if missing and (status := sweeps.main([str(config)])):
        raise RunError(f"python -m experiments.sweep {config} ended with status {status}")
    return Path(shutil.copytree(folder, scratch() / name)) if SMOKE else folder


def scratch() -> Path:
    """A folder that is deleted when this process ends."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


def show(figure: Figure) -> None:
    """Show a figure in the notebook, and close it."""
    import matplotlib.pyplot as plt

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    plt.close(figure)
    display(Image(drawn.getvalue(), width=900))
