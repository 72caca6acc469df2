"""Fits and figures of a run whose cost model is known."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from experiments import plot
from experiments.sweep import fit
from experiments.sweep.prompts import Arm, Point, expected_cached, layout
from experiments.sweep.run_folder import Measurement, Run, cells, load
from experiments.sweep.targets import Answer
from model.families import read_config
from serve.cost.file import load_constants
from serve.cost.model import Constants

TRUE = Constants(fixed=3e-3, linear=2e-5, attention=8e-9, match=3e-7)
SHAPE = {
    "model_type": "qwen3",
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 65536,
}


def run_of(folder: Path, arms: tuple[Arm, ...] = ("varying",), page_sizes: tuple[int, ...] = (64,)) -> Path:
    """A run as a sweep writes it, on a model whose TTFT is known up to 2%."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPE))
    run, rng = Run(folder / "run", b"config"), np.random.default_rng(0)
    run.begin(dtype="float32", device="cpu")
    places = {"varying": ("0%", "1%", "10%", "25%", "50%", "75%", "90%", "100%")}
    for arm in arms:
        for length in (2048, 4096, 8192, 16384, 32768):
            for place in places.get(arm, ("",)):
                for page in page_sizes:
                    point = Point(arm, str(model), page, length, 32, 64, place)
                    cached = expected_cached(layout(point))
                    for repeat in range(5):
                        ms = 1e3 * TRUE.ttft_s(length, cached) * (1 + 0.02 * rng.standard_normal())
                        run.append(Measurement(point, repeat, Answer(ms, length, cached), cached, 0, "now"))
    return run.folder


def test_a_run_is_fitted_and_the_server_can_load_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = run_of(tmp_path)
    assert fit.main([str(folder)]) == 0
    found = load_constants(folder / fit.FILE, read_config(SHAPE))
    assert found.linear == pytest.approx(TRUE.linear, rel=0.05)
    assert found.attention == pytest.approx(TRUE.attention, rel=0.05)
    written = json.loads((folder / fit.FILE).read_text())
    assert written["held_out"]["median_relative_error"] < 0.05
    assert written["held_out"]["r_squared"] > 0.99
    assert (written["points"], written["session"]["dtype"]) == (40, "float32")
    first = written["prices"][0]
    assert (first["position"], first["prompt_tokens"]) == (0, 32768)
    assert first["ms"] == pytest.approx(1e3 * TRUE.compute_s(0, 32768), rel=0.05)
    assert first["flops"] > written["prices"][1]["flops"] > 0
    printed = capsys.readouterr().out
    assert "a computed token" in printed
    assert "beats recompute from position" in printed


def test_a_run_over_page_sizes_is_fitted_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = run_of(tmp_path, page_sizes=(16, 64))
    assert fit.main([str(folder)]) == 2
    assert "choose them with --model and --page-size" in capsys.readouterr().err
    assert fit.main([str(folder), "--page-size", "16"]) == 0
    assert json.loads((folder / fit.FILE).read_text())["page_size"] == 16
    assert fit.main([str(folder), "--page-size", "32"]) == 2


@pytest.mark.parametrize("program", [fit.main, plot.main])
def test_a_folder_without_a_run_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, program: Any
) -> None:
    assert program([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds no run" in line


def test_each_figure_is_written_at_a_readmes_size(tmp_path: Path) -> None:
    folder = run_of(tmp_path, ("stable", "varying", "stripped"))
    assert plot.main([str(folder)]) == 0
    for name in ("arms.png", "position.png", "predicted.png"):
        pixels = matplotlib.image.imread(folder / name)
        assert 700 < pixels.shape[1] <= 1400
        assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50


def test_too_few_points_for_a_curve_still_give_the_arms(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", b"config")
    run.begin(dtype="float32", device="cpu")
    for arm in ("stable", "varying"):
        point = Point(arm, "m", 64, 1000, 32, 64, "0%" if arm == "varying" else "")  # type: ignore[arg-type]
        run.append(Measurement(point, 0, Answer(5.0, 1000, 0), 0, 0, "now"))
    assert plot.main([str(run.folder)]) == 0
    assert [path.name for path in run.folder.glob("*.png")] == ["arms.png"]
    assert not (run.folder / "cost_model.json").exists()


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The figures of a run by name, laid out but not closed."""
    drawn: dict[str, Any] = {}

    def keep(figure: Any, path: Path) -> None:
        figure.canvas.draw()
        drawn[path.stem] = figure

    monkeypatch.setattr(plot, "save", keep)
    folder = run_of(tmp_path, ("stable", "varying", "stripped", "relocated"))
    plot.main([str(folder)])
    assert len(cells(load(folder))) == 5 * (8 + 3)
    return drawn


def test_axes_say_what_they_show_and_in_which_unit(figures: dict[str, Any]) -> None:
    position, predicted = figures["position"].axes[0], figures["predicted"].axes[0]
    assert "tokens" in position.get_xlabel()
    assert position.get_yscale() == predicted.get_xscale() == predicted.get_yscale() == "log"
    assert any(label.get_text().endswith(("ms", " s")) for label in position.get_yticklabels())
    assert all(axes.get_xlabel() for figure in figures.values() for axes in figure.axes)
    assert "log scale" in figures["arms"].axes[0].get_xlabel()


def test_no_words_are_cut_off_or_lie_on_each_other(figures: dict[str, Any]) -> None:
    for name, figure in figures.items():
        (axes,) = figure.axes
        whole = figure.bbox.padded(1)
        notes = [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        boxes = [text.get_window_extent() for text in notes if text.get_text()]
        assert len(boxes) >= 3
        for box in boxes:
            assert whole.contains(box.x0, box.y0), name
            assert whole.contains(box.x1, box.y1), name
        assert not any(one.overlaps(two) for one, two in combinations(boxes, 2)), name
