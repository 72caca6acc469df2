"""Greedy answers beside those of transformers and llama.cpp, on the same GGUF file.

`python -m experiments.quality.greedy` needs the `test` and `llama-cpp` extras. transformers gets the dequantised
weights. llama.cpp runs the file as it is, where it rounds activations to 8 bits before every product with quantised
weights, and a float32 copy of it, where it does not: what is left between that and us is the order of sums. It takes
prompts of the file token by token: its kernels for several tokens of Q4_1 crash on a processor with AMX
(llama-cpp-python 0.3.36). Others follow our answer up to the first token that they expect differently, which is where
theirs would differ: llama.cpp token by token, transformers in one pass over it.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from experiments.bench.llama_cpp import load_llama, need
from experiments.bench.timing import timed_tokens
from experiments.harness.provenance import PACKAGES, machine, provenance
from experiments.harness.report import make_table, write_json
from experiments.quality.scoring import PAGE, Scorer
from experiments.quality.texts import KINDS, documents
from experiments.workloads.trained_model import fetch
from model import checkpoint
from model.formats import gguf
from model.formats.gguf_file import read_gguf
from model.kernels.dispatch import arranged
from serve.engine.engine import Engine
from serve.engine.settings import EngineSettings
from serve.prompt.tokenizer import load_tokenizer

RESULTS = Path("experiments/results/quality/greedy.json")
TIE = 1e-4  # of the logits' scale: two tokens nearer than that are a tie

# Held, since llama.cpp calls it as long as the process lives.
SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)

# What another expects most after a prompt, [tokens] int32, and each token of our answer, at least up to a difference.
Follow = Callable[[np.ndarray, Sequence[int]], Sequence[int]]


@dataclass(frozen=True)
class Difference:
    """Where an answer first differs from ours."""

    prompt: int
    after: int  # tokens that are the same
    gap: float  # of our logits, between our token and the other's, as a share of the largest one


def transformers_model(path: Path) -> Any:
    """transformers' own model with a GGUF file's dequantised weights, in float32."""
    file = read_gguf(path)
    config = gguf.read_config(file)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    state = {name: torch.tensor(tensor.values().astype(np.float32)) for name, tensor in gguf.tensors_of(file).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model.eval()


def follow_in_torch(model: Any, prompt: np.ndarray, answer: Sequence[int]) -> Sequence[int]:
    """A `Follow` by transformers' model."""
    text = torch.tensor([[*prompt.tolist(), *answer[:-1]]])
    with torch.inference_mode():
        found: list[int] = model(text, logits_to_keep=len(answer)).logits[0].argmax(-1).tolist()
    return found


def follow_in_llama(runner: Any, prompt: np.ndarray, answer: Sequence[int]) -> Sequence[int]:
    """A `Follow` by llama.cpp."""
    read = need("llama_cpp").llama_get_logits_ith
    found: list[int] = []
    runner.reset()
    for new in (prompt.tolist(), *([token] for token in answer[:-1])):
        runner.eval(new)
        found.append(int(np.ctypeslib.as_array(read(runner.ctx, -1), (runner.n_vocab(),)).argmax()))
        if found[-1] != answer[len(found) - 1]:
            break
    return found


def write_float32(path: Path, target: Path) -> None:
    """Have llama.cpp write a GGUF file anew, its weights dequantised to float32, and log nothing from then on."""
    llama_cpp = need("llama_cpp")
    llama_cpp.llama_log_set(SILENT, None)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_ALL_F32, True
    if llama_cpp.llama_model_quantize(str(path).encode(), str(target).encode(), params):
        raise RuntimeError(f"llama.cpp could not write {target}")


def differences(
    ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]], prompts: Sequence[np.ndarray], scorer: Scorer
) -> list[Difference]:
    """Where answers first differ, and how near the two tokens are by our logits."""
    found = []
    for number, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        after = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), None)
        if after is None:
            continue
        text = np.concatenate([prompts[number], np.asarray(own[:after], np.int32)])
        *_, last = scorer.logits(text)
        logits = np.asarray(last[-1])
        gap = (logits[own[after]] - logits[other[after]]) / np.abs(logits).max()
        found.append(Difference(number, after, float(gap)))
    return found


def summary(found: Sequence[Difference], prompts: int, count: int) -> dict[str, Any]:
    """One side's row."""
    gaps = [each.gap for each in found]
    return {
        "same": prompts - len(found),
        "tokens_before_a_difference": sum(each.after for each in found) + (prompts - len(found)) * count,
        "ties": sum(gap < TIE for gap in gaps),
        "gap_median": float(median(gaps)) if gaps else 0.0,
        "gap_max": max(gaps, default=0.0),
        "differences": [asdict(each) for each in found],
    }


def measure(path: Path, count: int, each_kind: int, prompt_tokens: int, console: Console) -> dict[str, Any]:
    """The rows of all sides."""
    config, params = checkpoint.load(path, "float32")
    packed, encode = arranged(params, PAGE), load_tokenizer(str(path)).encode
    prompts = [text for kind in KINDS for text in documents(kind, encode, prompt_tokens, each_kind)]
    total = prompt_tokens + count + 1
    engine = Engine(packed, config, EngineSettings(64 * (total // PAGE + 2), total, PAGE, max_num_seqs=1))
    engine.start()
    threads, model = machine()["cores"], transformers_model(path)

    with tempfile.TemporaryDirectory() as folder:
        write_float32(path, Path(folder, "float32.gguf"))
        whole = load_llama(Path(folder, "float32.gguf"), total, threads, flash=False)
        sides: dict[str, Follow] = {
            "transformers": partial(follow_in_torch, model),
            "llama.cpp": partial(follow_in_llama, load_llama(path, total, threads, flash=False, batch=1)),
            "llama.cpp, weights as float32": partial(follow_in_llama, whole),
        }
        ours, answers = [], {side: list[Sequence[int]]() for side in sides}
        for prompt in track(prompts, description="prompts", console=console):
            ours.append([token for _, token in timed_tokens(engine, prompt, count)])
            for side, follow in sides.items():
                answers[side].append(follow(prompt, ours[-1]))
    engine.stop()
    scorer = Scorer(config, packed, chunk=prompt_tokens + count)
    rows = {
        side: summary(differences(ours, made, prompts, scorer), len(prompts), count) for side, made in answers.items()
    }
    return {"prompts": len(prompts), "prompt_tokens": prompt_tokens, "tokens": count, "sides": rows}


def table(result: Mapping[str, Any]) -> Table:
    """What each side has in common with us."""
    columns = ("beside", "same answers", "tokens before a difference", "ties", "gap, median", "largest")
    grid = make_table(columns, words=("beside",), title=f"greedy answers of {result['tokens']} tokens")
    for side, row in result["sides"].items():
        before = f"{row['tokens_before_a_difference']:,} of {result['prompts'] * result['tokens']:,}"
        gaps = (f"{row[name]:.1e}" for name in ("gap_median", "gap_max"))
        grid.add_row(side, f"{row['same']} of {result['prompts']}", before, str(row["ties"]), *gaps)
    grid.caption = f"gap: between the two tokens by our logits, over the largest of them; a tie is below {TIE:g}"
    return grid


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    cli = argparse.ArgumentParser(prog="python -m experiments.quality.greedy", description=__doc__.split("\n")[0])
    cli.add_argument("--model", type=Path, help="a GGUF file (default: SmolLM2-135M-Instruct)")
    cli.add_argument("--tokens", type=int, default=100, help="of each answer (default: %(default)s)")
    cli.add_argument("--prompts", type=int, default=25, help="of each kind of text (default: %(default)s)")
    cli.add_argument("--prompt-tokens", type=int, default=128, help="(default: %(default)s)")
    cli.add_argument("--out", type=Path, default=RESULTS, help="JSON to write (default: %(default)s)")
    args = cli.parse_args(argv)
    torch.set_num_threads(machine()["cores"])
    console, model = Console(), args.model or fetch()
    result = measure(model, args.tokens, args.prompts, args.prompt_tokens, console)
    about = {"model": model.name, "dtype": "float32"}
    write_json(args.out, about | result | provenance((*PACKAGES, "llama-cpp-python", "gguf")))
    console.print(table(result))


if __name__ == "__main__":
    main()
