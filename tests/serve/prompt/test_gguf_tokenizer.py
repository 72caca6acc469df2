"""Tokenizers out of GGUF files: the ids of the tokenizers that the files were made from."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

import serve.prompt.gguf_tokenizer as gguf_tokenizer_module
from experiments.workloads.demo_model import TINY, corpus, write_demo_model
from experiments.workloads.gguf_file import write_gguf
from model.formats.gguf_file import read_gguf
from serve.prompt.gguf_tokenizer import SPACE, SPLITS, gguf_tokenizer
from serve.prompt.tokenizer import check_tokenizer_file, load_hf, load_tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARK = "<think>"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LETTERS = "abc ABC 019 \n\t\r,.'\"-_/\\äöüßéñ日本語ไทยहिं ½Ⅳ²٣ 👩‍👧 \u00a0\u2003 's 'LL don't I'M é"
# What has a split of its own in SPLITS, as the tokenizer.json of such a model has it.
GPT2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
ORIGINALS: dict[str, Any] = {
    "gpt-2": GPT2_WORDS,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2_WORDS]),
    **{
        name: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        for name in ("llama-bpe", "qwen2", "tekken", "gpt-4o")
    },
}


def texts() -> list[str]:
    """Sources, and letters of many scripts in no order."""
    rng = random.Random(0)
    drawn = ["".join(rng.choice(LETTERS) for _ in range(120)) for _ in range(60)]
    return [
        *corpus(60_000),
        *drawn,
        "",
        "   leading",
        "trailing   ",
        "\n\n\n",
        f"{SPECIAL[1]}user\nhi{MARK}x{SPECIAL[2]}",
    ]


def trained(split: Any, normalizer: Any = None) -> Tokenizer:
    """A small byte-level tokenizer with this split."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = split
    if normalizer:
        made.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([*corpus(100_000), *texts()], trainer)
    made.add_special_tokens([*SPECIAL])
    made.add_tokens([MARK])
    return made


def write_tokenizer(path: Path, tokenizer: Tokenizer, pre: str) -> None:
    """Write a file with a byte-level tokenizer and nothing else, and a token that only fills up the vocabulary."""
    writer = GGUFWriter(path, "llama")
    vocab = tokenizer.get_vocab()
    kinds = dict.fromkeys(SPECIAL, TokenType.CONTROL) | {MARK: TokenType.USER_DEFINED, "[PAD]": TokenType.UNUSED}
    tokens = [*sorted(vocab, key=vocab.__getitem__), "[PAD]"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.get(token, TokenType.NORMAL) for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]])
    writer.add_bos_token_id(vocab[SPECIAL[1]])
    writer.add_eos_token_id(vocab[SPECIAL[2]])
    writer.add_chat_template(TEMPLATE)
    write(writer)


def write(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_split_has_an_original_to_compare_with() -> None:
    assert {id(split) for split in SPLITS.values()} == {id(SPLITS[name]) for name in ORIGINALS}


@pytest.mark.parametrize("pre", ORIGINALS)
def test_byte_level_ids_are_those_of_the_original(tmp_path: Path, pre: str) -> None:
    original = trained(ORIGINALS[pre], normalizers.NFC() if pre == "qwen2" else None)
    write_tokenizer(tmp_path / "model.gguf", original, pre)
    hf = gguf_tokenizer(tmp_path / "model.gguf")
    for text in texts():
        ids = original.encode(text, add_special_tokens=False).ids
        assert hf.encode(text, add_special_tokens=False) == ids, text
        assert hf.decode(ids) == (text if pre != "qwen2" else unicodedata.normalize("NFC", text))
    assert (hf.bos_token, hf.eos_token, hf.pad_token) == (SPECIAL[1], SPECIAL[2], None)
    assert "[PAD]" not in hf.get_vocab()
    prompt = hf.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("pre", [pre for pre in ORIGINALS if pre != "qwen2"])  # llama.cpp does not normalise
def test_ids_are_llama_cpps(tmp_path: Path, pre: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    write_tokenizer(tmp_path / "model.gguf", trained(ORIGINALS[pre]), pre)
    hf = gguf_tokenizer(tmp_path / "model.gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    for text in texts():
        ids = theirs.tokenize(text.encode(), add_bos=False, special=True)
        assert hf.encode(text, add_special_tokens=False) == ids, text


def pieces(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE as simple as can be: merge the best pair of neighbours until none makes a token."""
    symbols = list(SPACE + text.replace(" ", SPACE))
    while pairs := [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]:
        at = -max(pairs)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    return symbols


def sentence_piece_vocabulary() -> list[str]:
    """Tokens of some sources, most frequent first: the later, the worse."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE)
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False)
    made.train_from_iterator(corpus(60_000), trainer)
    vocab = made.get_vocab()
    learned = [token for token in sorted(vocab, key=vocab.__getitem__) if len(token) > 1]
    return [*learned, *(token for token in vocab if len(token) == 1)]


def write_sentence_piece(path: Path, tokens: Sequence[str], prefixed: bool) -> list[str]:
    """Write a SentencePiece tokenizer. Returns all of its tokens."""
    own = ["<unk>", "<s>", "</s>"]
    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*own, *raw, *tokens])
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(tokens))])
    writer.add_token_types([*kinds, *[TokenType.NORMAL] * len(tokens)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(prefixed)
    write(writer)
    return [*own, *raw, *tokens]


def test_sentence_piece_ids_are_those_of_its_algorithm(tmp_path: Path) -> None:
    learned = sentence_piece_vocabulary()
    tokens = write_sentence_piece(tmp_path / "model.gguf", learned, prefixed=True)
    hf = gguf_tokenizer(tmp_path / "model.gguf")
    scores = {token: -float(i) for i, token in enumerate(learned)}
    for text in [source[:400] for source in corpus(60_000)] + ["a", "  two", "the self of it"]:
        known = "".join(letter for letter in text if letter == " " or letter in scores)
        ids = hf.encode(known, add_special_tokens=False)
        assert [tokens[id] for id in ids] == pieces(known, scores)
        assert hf.decode(ids) == known
    (byte,) = hf.encode("€", add_special_tokens=False)[-1:]
    assert tokens[byte] == "<0xAC>"


@pytest.mark.parametrize("prefixed", [True, False])
def test_sentence_piece_ids_are_llama_cpps(tmp_path: Path, prefixed: bool) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    write_sentence_piece(tmp_path / "model.gguf", sentence_piece_vocabulary(), prefixed)
    hf = gguf_tokenizer(tmp_path / "model.gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    for text in [text for text in texts() if text and SPECIAL[1] not in text]:
        assert hf.encode(text, add_special_tokens=False) == theirs.tokenize(text.encode(), add_bos=False), text


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo model as a checkpoint folder and as a GGUF file."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    write_demo_model(folder, config=TINY)
    write_gguf(folder, folder.with_suffix(".gguf"))
    return folder, folder.with_suffix(".gguf")


def test_the_demo_model_has_the_same_ids_and_prompts_either_way(demo: tuple[Path, Path]) -> None:
    ours, theirs = (load_tokenizer(str(source)) for source in reversed(demo))
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "naïve 日本 12345\n\n x"}]
    prompts = [
        each.hf.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for each in (ours, theirs)
    ]
    assert prompts[0] == prompts[1]
    np.testing.assert_array_equal(ours.encode(prompts[0]), theirs.encode(prompts[0]))
    assert ours.template == theirs.template


def test_a_folder_of_gguf_files_is_told_to_name_one(tmp_path: Path) -> None:
    for name in ("model-Q8_0.gguf", "model-Q4_0.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"found none: name a GGUF file in it, as model-Q4_0\.gguf"):
        check_tokenizer_file(tmp_path)


def test_fields_that_do_not_fit_the_tokens_are_named(demo: tuple[Path, Path], tmp_path: Path) -> None:
    write_sentence_piece(tmp_path / "pieces.gguf", ["a", "b", "ab"], prefixed=True)
    for path, field, value, message in (
        (demo[1], "token_type", np.ones(7, np.int32), "has 7 entries, expected"),
        (demo[1], "token_type", "normal", "is a str, expected ndarray"),
        (demo[1], "merges", ["a b", "absent"], "do not fit"),
        (demo[1], "merges", ["a absent"], "do not fit"),
        (demo[1], "bos_token_id", "one", "is a str, expected int"),
        (tmp_path / "pieces.gguf", "scores", np.zeros(0), "has 0 entries, expected 262"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            file = read_gguf(path)
            changed = replace(file, metadata=file.metadata | {f"tokenizer.ggml.{field}": value})
            patch.setattr(gguf_tokenizer_module, "read_gguf", lambda path, changed=changed: changed)
            with pytest.raises(ValueError, match=rf"\.gguf: tokenizer\.ggml\.{field} {message}"):
                gguf_tokenizer(path)


def test_a_token_that_a_file_names_and_has_not_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sentence_piece(tmp_path / "model.gguf", ["a", "b", "ab"], prefixed=True)
    file = read_gguf(tmp_path / "model.gguf")
    ids = {"tokenizer.ggml.unknown_token_id": 262, "tokenizer.ggml.bos_token_id": -1}
    changed = replace(file, metadata=file.metadata | ids)
    monkeypatch.setattr(gguf_tokenizer_module, "read_gguf", lambda path: changed)
    hf = gguf_tokenizer(tmp_path / "model.gguf")
    assert (hf.bos_token, hf.eos_token, hf.unk_token) == (None, "</s>", None)


def test_tokenizers_that_are_not_served_are_named(demo: tuple[Path, Path], tmp_path: Path) -> None:
    data = demo[1].read_bytes()
    for old, new, message in (
        (b"qwen2", b"qwen9", r"tokenizer\.ggml\.pre is 'qwen9', supported are gpt-2, smollm"),
        (
            b"\x04\x00\x00\x00\x00\x00\x00\x00gpt2",
            b"\x04\x00\x00\x00\x00\x00\x00\x00bert",
            "model is 'bert', supported",
        ),
        (b"ggml.merges", b"ggml.mErges", r"the metadata has no tokenizer\.ggml\.merges"),
    ):
        (tmp_path / "other.gguf").write_bytes(data.replace(old, new, 1))
        for load in (check_tokenizer_file, load_hf):
            with pytest.raises(ValueError, match=rf"other\.gguf: .*{message}"):
                load(tmp_path / "other.gguf")
        (tmp_path / "other.gguf").unlink()
