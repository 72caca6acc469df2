"""The tokenizer and chat template of a GGUF file, as a fast Hugging Face tokenizer that gives the original's ids.

transformers builds one as well (`AutoTokenizer.from_pretrained(folder, gguf_file=...)`): it needs torch, and where it
does not know the file's `tokenizer.ggml.pre`, as SmolLM's, it splits text as GPT-2 does, which gives other ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from model.formats.gguf_file import GgufFile, read_gguf

FIELD = "tokenizer.ggml"
SPACE = "\u2581"  # what SentencePiece writes for one
# Types of tokens: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SIGNS_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORD_START = r"[^\r\n\p{L}\p{N}]?"
SIGNS_AND_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def cased_words(ending: str = "") -> str:
    """The pattern of words that are cut where lower case turns to upper, with what may end them."""
    return rf"{WORD_START}{UPPER}*{LOWER}+{ending}|{WORD_START}{UPPER}+{LOWER}*{ending}"


@dataclass(frozen=True)
class Split:
    """How a byte-level tokenizer cuts text before it merges."""

    pattern: str = ""  # a regular expression; none: GPT-2's
    digits: bool = False  # each digit by itself, before anything else
    whole_words: bool = False  # a word that is a token stays one, whatever the merges say
    composed: bool = False  # text is normalised to NFC


GPT2 = Split()
SMOLLM = Split(digits=True)
LLAMA3 = Split(rf"{CONTRACTIONS}|{WORD_START}\p{{L}}+|\p{{N}}{{1,3}}|{SIGNS_AND_SPACE}", whole_words=True)
QWEN2 = Split(rf"{CONTRACTIONS}|{WORD_START}\p{{L}}+|\p{{N}}|{SIGNS_AND_SPACE}", composed=True)
TEKKEN = Split(rf"{cased_words()}|\p{{N}}|{SIGNS_AND_SLASHES}", whole_words=True)
GPT4O = Split(rf"{cased_words(CONTRACTIONS + '?')}|\p{{N}}{{1,3}}|{SIGNS_AND_SLASHES}")
# By `tokenizer.ggml.pre`.
SPLITS: Mapping[str, Split] = {
    "gpt-2": GPT2,
    "smollm": SMOLLM,
    "starcoder": SMOLLM,
    "refact": SMOLLM,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "tekken": TEKKEN,
    "gpt-4o": GPT4O,
}


def gguf_tokenizer(path: str | Path) -> Any:
    """The Hugging Face tokenizer of a GGUF file, its chat template included where the file has one.

    Raises what `read_gguf` raises, and ValueError naming the field for a tokenizer that is not served.
    """
    from transformers import PreTrainedTokenizerFast

    file = read_gguf(path)
    tokens = check_tokenizer(file)
    build = byte_level if file.metadata[f"{FIELD}.model"] == "gpt2" else sentence_piece
    backend = build(file, tokens)
    kinds = file.metadata.get(f"{FIELD}.token_type", [])
    special = [token for token, kind in zip(tokens, kinds, strict=False) if kind == CONTROL]
    added = [token for token, kind in zip(tokens, kinds, strict=False) if kind == USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in added])
    named = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    found = {f"{ours}_token": token_of(file, tokens, theirs) for theirs, ours in named.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in found.items() if token is not None},
    )


def check_tokenizer(file: GgufFile) -> list[str]:
    """The tokens of a file by their ids. Raises ValueError naming the field for a tokenizer that is not served."""
    model, tokens = file.value(f"{FIELD}.model", str), file.value(f"{FIELD}.tokens", list)
    if model not in ("gpt2", "llama"):
        raise ValueError(f"{file.path}: {FIELD}.model is {model!r}, supported are gpt2, llama: use another file")
    if model == "gpt2":
        file.value(f"{FIELD}.merges", list)
        if (pre := file.value(f"{FIELD}.pre", str)) not in SPLITS:
            supported = ", ".join(SPLITS)
            raise ValueError(f"{file.path}: {FIELD}.pre is {pre!r}, supported are {supported}: use another file")
    if not tokens:
        raise ValueError(f"{file.path}: {FIELD}.tokens is empty, expected a vocabulary: convert the checkpoint again")
    defaults = {"token_type": np.ones(len(tokens))} | ({"scores": None} if model == "llama" else {})
    for field, default in defaults.items():
        entries = file.value(f"{FIELD}.{field}", np.ndarray, default)
        if len(entries) != len(tokens):
            raise ValueError(
                f"{file.path}: {FIELD}.{field} has {len(entries)} entries, expected {len(tokens)}: convert it again"
            )
    return list(tokens)


def token_of(file: GgufFile, tokens: Sequence[str], kind: str) -> str | None:
    """The token that a file names for a purpose; None where it names none that there is."""
    id = file.value(f"{FIELD}.{kind}_token_id", int, -1)
    return tokens[id] if 0 <= id < len(tokens) else None


def byte_level(file: GgufFile, tokens: Sequence[str]) -> Tokenizer:
    """A byte-level BPE tokenizer, as GPT-2 has, without its added tokens."""
    split = SPLITS[file.metadata[f"{FIELD}.pre"]]
    merges = [tuple(merge.split(" ", 1)) for merge in file.metadata[f"{FIELD}.merges"]]
    try:
        made = Tokenizer(models.BPE(vocabulary(file, tokens), merges, ignore_merges=split.whole_words))
    except Exception as error:  # the library raises no narrower one
        raise ValueError(
            f"{file.path}: {FIELD}.merges do not fit {FIELD}.tokens ({error}): convert the checkpoint again"
        ) from error
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split.pattern))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if split.composed:
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    return made


def sentence_piece(file: GgufFile, tokens: Sequence[str]) -> Tokenizer:
    """A SentencePiece BPE tokenizer, as Llama 2 has, without its added tokens."""
    vocab = vocabulary(file, tokens)
    made = Tokenizer(
        models.BPE(
            vocab,
            merges_of(vocab, file.metadata[f"{FIELD}.scores"]),
            unk_token=token_of(file, tokens, "unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = file.metadata.get(f"{FIELD}.add_space_prefix", True)
    first = [normalizers.Prepend(SPACE)] if prefixed else []
    made.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    last = [decoders.Strip(" ", 1, 0)] if prefixed else []
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return made


def vocabulary(file: GgufFile, tokens: Sequence[str]) -> dict[str, int]:
    """The tokens' ids; those that only fill up the embedding are left out."""
    kinds = file.metadata.get(f"{FIELD}.token_type")
    return {token: id for id, token in enumerate(tokens) if kinds is None or kinds[id] != UNUSED}


def merges_of(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece vocabulary, which has none: every pair of tokens that makes another, best first."""
    pairs = [
        (-scores[id], (token[:cut], token[cut:]))
        for token, id in vocab.items()
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    return [pair for _, pair in sorted(pairs, key=lambda found: found[0])]
