"""A small qwen3-shaped Hugging Face checkpoint with seeded random weights and a real byte-level BPE tokenizer.

The tokenizer is trained on the running Python's own standard library, so nothing is downloaded and no torch is needed.
Run `python -m experiments.demo_model DIR`: a complete DIR is left as it is, `--force` writes it again.
"""

import json
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from safetensors.numpy import save
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|im_end|>"
PAD = "<|endoftext|>"
# Control tokens vanish when text is decoded; delimiters stay, for the parser of tool calls and thinking.
CONTROLS = (PAD, "<|im_start|>", END)
MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

# The split of the Qwen family: contractions, words with one leading sign, single digits, runs of signs, white space.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
OUTSIDE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
MACHINE = ("_sysconfig", "config-")  # hold the build machine's paths, which differ between installs of one release

# Nothing is trimmed and no reasoning is dropped: a longer history always renders as an extension of a shorter one.
# An empty reasoning_content renders as the empty block that `enable_thinking=false` opens the answer with.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content -%}{%- for block in content -%}{{ block.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set first = messages[0] if messages and messages[0].role == 'system' else none -%}
{%- if first or tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if first -%}{{- text(first.content) -}}{%- endif -%}
{%- if tools -%}
{{- '\\n\\n' if first else '' -}}
{{- '# Tools\\n\\nCall a function whenever it helps. The functions, one JSON signature a line:\\n<tools>' -}}
{%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}
{{- '\\n</tools>\\n\\nWrite each call as one JSON object with its name and arguments between call tags:\\n' -}}
{{- '<tool_call>\\n{"name": <function-name>, "arguments": <object>}\\n</tool_call>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if message.reasoning_content is string -%}
{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' -}}
{%- endif -%}
{%- set body = text(message.content) -%}
{{- body -}}
{%- for call in message.tool_calls or [] -%}
{%- set call = call.function or call -%}
{{- '\\n' if body or not loop.first else '' -}}
{{- '<tool_call>\\n{"name": ' -}}{{- call.name | tojson -}}{{- ', "arguments": ' -}}
{{- call.arguments if call.arguments is string else call.arguments | tojson -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif message.role == 'tool' -%}
{{- '' if loop.previtem and loop.previtem.role == 'tool' else '<|im_start|>user' -}}
{{- '\\n<tool_response>\\n' -}}{{- text(message.content) -}}{{- '\\n</tool_response>' -}}
{{- '' if loop.nextitem and loop.nextitem.role == 'tool' else '<|im_end|>\\n' -}}
{%- elif not (loop.first and first) -%}
{{- '<|im_start|>' + message.role + '\\n' -}}{{- text(message.content) -}}{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the model and of the text that its tokenizer learns from."""

    hidden: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 768
    vocab: int = 16_384
    positions: int = 262_144
    rope_theta: float = 1e6
    corpus_chars: int = 8_000_000
    end_scale: float = 1.5


TINY = DemoConfig(64, 2, 4, 2, 16, 128, vocab=1024, positions=4096, corpus_chars=200_000)


@cache
def source_files() -> tuple[Path, ...]:
    """The standard library's own Python files in sorted order, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    ours = (path for path in found if OUTSIDE.isdisjoint(path.parts) and not path.parts[0].startswith(MACHINE))
    files = tuple(root / path for path in sorted(ours, key=lambda path: path.as_posix()))
    if not files:
        raise FileNotFoundError(f"no Python sources in {root}: expected the standard library, use a full Python")
    return files


def source_text(path: Path) -> str:
    """A source file as text; bytes that are not UTF-8 become replacement characters."""
    return path.read_text(encoding="utf-8", errors="replace")


def corpus(chars: int) -> list[str]:
    """Whole source files of about `chars` characters together, spread evenly over the library."""
    files = source_files()
    stride = max(1, round(sum(path.stat().st_size for path in files) / chars))
    return [source_text(path) for path in files[::stride]]


def train_tokenizer(config: DemoConfig, console: Console | None = None) -> Tokenizer:
    """A byte-level BPE tokenizer with the Qwen split; its special tokens hold the last ids."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    # No normaliser: what is decoded is, byte for byte, what was encoded.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab - len(CONTROLS + MARKS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = corpus(config.corpus_chars)
    tokenizer.train_from_iterator(_watched(texts, console or Console(quiet=True)), trainer, length=len(texts))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROLS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in MARKS])
    return tokenizer


def _watched(texts: list[str], console: Console) -> Iterator[str]:
    """The texts, with a progress bar that stays up while the merges are counted."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        yield from progress.track(texts, description="tokenizer: reading the standard library")
    console.print(f"tokenizer: merging pairs of {sum(map(len, texts)):,} characters (a few seconds)")


def weights(config: DemoConfig, vocab: int, seed: int) -> dict[str, np.ndarray]:
    """Random tensors under Hugging Face's names, scaled so that greedy output wanders and turns come to an end."""
    rng = np.random.default_rng(seed)

    def draw(rows: int, columns: int, scale: float) -> np.ndarray:
        return rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(scale)

    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    embed = draw(vocab, config.hidden, 2.5 * config.hidden**-0.5)
    # Shrunk rows are never the best token: a random model must not open tool calls. The end of turn is grown instead,
    # so that it wins once in some hundred tokens and few requests run to their max_tokens.
    special = embed[-len(CONTROLS + MARKS) :]
    special *= np.where([token == END for token in CONTROLS + MARKS], config.end_scale, 0.5).astype(np.float32)[:, None]
    tensors = {"model.embed_tokens.weight": embed, "model.norm.weight": np.ones(config.hidden, np.float32)}
    for layer in range(config.layers):
        # Layers outweigh the embedding: with tied weights it would otherwise make the model repeat its last token.
        shapes = {
            "self_attn.q_proj": (q, config.hidden, config.hidden**-0.5),
            "self_attn.k_proj": (kv, config.hidden, config.hidden**-0.5),
            "self_attn.v_proj": (kv, config.hidden, config.hidden**-0.5),
            "self_attn.o_proj": (config.hidden, q, 4 * q**-0.5),
            "mlp.gate_proj": (config.intermediate, config.hidden, config.hidden**-0.5),
            "mlp.up_proj": (config.intermediate, config.hidden, config.hidden**-0.5),
            "mlp.down_proj": (config.hidden, config.intermediate, 4 * config.intermediate**-0.5),
        }
        norms = {
            "input_layernorm": np.ones(config.hidden, np.float32),
            "post_attention_layernorm": np.ones(config.hidden, np.float32),
            # Sharper than 1: attention picks tokens out of a long context, so a wrong cache shows in the output.
            "self_attn.q_norm": np.full(config.head_dim, 2, np.float32),
            "self_attn.k_norm": np.ones(config.head_dim, np.float32),
        }
        matrices = {name: draw(*shape) for name, shape in shapes.items()}
        tensors |= {f"model.layers.{layer}.{name}.weight": value for name, value in (matrices | norms).items()}
    return tensors


def write_demo_model(
    path: str | Path,
    seed: int = 0,
    config: DemoConfig = DemoConfig(),
    force: bool = False,
    console: Console | None = None,
) -> bool:
    """Write the checkpoint unless a complete one is there; true if it was written.

    The files are made in a folder next to `path`, which is renamed last, so `path` never holds half a checkpoint.
    """
    target = Path(path).absolute()
    if not force and all((target / name).is_file() for name in FILES):
        return False
    foreign = sorted({entry.name for entry in target.iterdir()} - set(FILES)) if target.is_dir() else []
    if foreign:
        raise FileExistsError(f"{target} holds {foreign[0]!r}, which is not part of a demo model: name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        made.mkdir()
        _write_files(made, seed, config, console or Console(quiet=True))
        if target.exists():
            target.rename(Path(scratch) / "replaced")
        made.rename(target)
    return True


def _write_files(folder: Path, seed: int, config: DemoConfig, console: Console) -> None:
    tokenizer = train_tokenizer(config, console)
    tokenizer.save(str(folder / "tokenizer.json"))
    # The vocabulary is smaller than asked for where the corpus runs out of pairs: the model has a row for each token.
    tensors = weights(config, tokenizer.get_vocab_size(), seed)
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    for name, content in documents(config, tokenizer).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    count = sum(tensor.size for tensor in tensors.values())
    console.print(f"model: {count / 1e6:.1f}M parameters, vocabulary of {tokenizer.get_vocab_size():,}")


def documents(config: DemoConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """The JSON files next to the weights, by file name."""
    end, pad = tokenizer.token_to_id(END), tokenizer.token_to_id(PAD)
    model = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.positions,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "float32",
        "bos_token_id": pad,
        "eos_token_id": end,
    }
    generation = {"bos_token_id": pad, "eos_token_id": [end, pad], "pad_token_id": pad, "do_sample": False}
    vocabulary = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "bos_token": None,
        "unk_token": None,
        "additional_special_tokens": list(CONTROLS),
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.positions,
        "chat_template": CHAT_TEMPLATE,
    }
    return {"config.json": model, "generation_config.json": generation, "tokenizer_config.json": vocabulary}
