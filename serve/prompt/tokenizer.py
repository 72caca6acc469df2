"""A checkpoint's tokenizer: text to token ids by segments that are remembered, with the ids of the whole text."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from cache.disk import DiskTier
from cache.lmdb_env import RECORDS, check_directory
from cache.tier import Tier
from cache.worker import Worker
from model.config import read_json
from model.formats.gguf_file import is_gguf, read_gguf
from serve.limits.bounds import DEFAULT_BOUNDS
from serve.limits.recent import SCOPE, Recent
from serve.prompt.probe import check_usable, probe_template
from serve.prompt.template import Template

# Of one text between two control tokens. Copying more ids from the tokenizer would block all other threads too long.
MOST_TOKENS = 2**20
# The tokens of longer texts are counted slice by slice first: a whole text may have 30 million.
LONG_CHARS, COUNTED_CHARS, COUNTED_TOGETHER = 2**21, 2**16, 2**18
FAR_BEYOND = 1.25  # a text is far beyond a limit at so many times of it
HEAD_SHARE = 16  # of the memory for segments, one part in so many is for texts of heads
NUMPY_BYTES = 200  # of an array besides its values, and of a text besides its characters
SEGMENT_FOLDER = "segments"  # below the store directory
STORED_BYTES = 64 * 2**20  # of ids on disk
STORED_CHARS = 1000  # shorter segments are tokenised faster than they are read
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class TooManyTokens(ValueError):
    """A text or a prompt has about `tokens` tokens, which are more than `most`."""

    def __init__(self, tokens: int, most: int) -> None:
        super().__init__(f"about {tokens} tokens, expected at most {most}")
        self.tokens, self.most = tokens, most


class Encode(Protocol):
    """Text to ids, special tokens recognised, none added."""

    def __call__(self, text: str, following: Sequence[str] = ()) -> np.ndarray:
        """[tokens] int32. Texts that are encoded next are tokenised together with it, where they are remembered."""


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer with its chat template and an `encode` that remembers segments."""

    hf: Any
    encode: Encode
    encode_after: Callable[[str], np.ndarray]  # the same for text that follows other text
    template: Template
    max_token_chars: int  # the most characters that a token stands for
    segments: Recent[str, np.ndarray]  # [tokens] int32 by text: what `encode` remembers
    heads: Recent[bytes, tuple[str, ...]]  # texts of heads of conversations, see `render.kept`


def load_tokenizer(
    folder: str,
    format_name: str | None = None,
    store: Path | None = None,
    segment_bytes: int = DEFAULT_BOUNDS.segments,
) -> Tokenizer:
    """The tokenizer of a checkpoint folder or a GGUF file.

    `format_name` overrides how its model writes calls (see `families.choose_format`). It remembers tokenised segments
    and texts of heads in at most `segment_bytes` of memory. With a `store` directory, long segments are found there
    again after a restart. Raises ValueError for a tokenizer that is not a fast one or has no chat template and for an
    unknown format, StoreError for a directory of another program or version.
    """
    hf = load_hf(folder)
    if not hf.chat_template:
        raise ValueError(
            f"{folder}: the tokenizer has no chat_template, which chat requests are rendered with: add one"
        )
    check_usable(hf, folder)
    if store is None:
        return make_tokenizer(hf, format_name, None, segment_bytes)
    check_directory(store)
    return make_tokenizer(hf, format_name, DiskTier(store / SEGMENT_FOLDER, STORED_BYTES, name=RECORDS), segment_bytes)


def load_hf(source: str | Path) -> Any:
    """The Hugging Face tokenizer of a checkpoint folder or a GGUF file.

    Raises ValueError for one that is not a fast one, and what `gguf_tokenizer` raises.
    """
    if is_gguf(source):
        from serve.prompt.gguf_tokenizer import gguf_tokenizer

        return gguf_tokenizer(source)
    check_tokenizer_file(source)
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(str(source))
    except Exception as error:  # of many kinds; the library names no file
        raise unread(Path(source), error) from error
    if not getattr(hf, "is_fast", False):
        raise ValueError(f"{source}: expected a tokenizer.json, found a slow tokenizer: convert it with transformers")
    return hf


def unread(folder: Path, error: Exception) -> ValueError:
    """What is wrong with the files of a tokenizer that could not be loaded, as an error that names the file."""
    for name in TOKENIZER_FILES:
        try:
            if (folder / name).is_file():
                read_json(folder / name)
        except (ValueError, OSError) as broken:
            return ValueError(str(broken))
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ValueError(
        f"{folder}: its tokenizer cannot be read from {' and '.join(TOKENIZER_FILES[:2])} ({reason:.300}): "
        "download them again"
    )


def check_tokenizer_file(source: str | Path) -> None:
    """Raise ValueError if a checkpoint folder or a GGUF file has no fast tokenizer, without loading one."""
    if is_gguf(source):
        from serve.prompt.gguf_tokenizer import check_tokenizer

        check_tokenizer(read_gguf(source))
    elif not Path(source, "tokenizer.json").is_file():
        files = sorted(path.name for path in Path(source).glob("*.gguf"))
        advice = f"name a GGUF file in it, as {files[0]}" if files else "write one with transformers' save_pretrained"
        raise ValueError(f"{source}: expected a tokenizer.json, found none: {advice}")


def make_tokenizer(
    hf: Any,
    format_name: str | None = None,
    segments: Tier | None = None,
    segment_bytes: int = DEFAULT_BOUNDS.segments,
) -> Tokenizer:
    """The Tokenizer of a fast Hugging Face tokenizer; a tier of `segments` keeps the ids of long ones."""
    head_bytes = segment_bytes // HEAD_SHARE
    memory = segment_memory(segment_bytes - head_bytes)
    encode = make_encoder(hf, segments, memory)
    return Tokenizer(
        hf,
        encode,
        make_encoder_after(hf, encode),
        probe_template(hf, format_name),
        max(map(len, hf.get_vocab())),
        memory,
        Recent(head_bytes, lambda texts: sum(map(sys.getsizeof, texts)), scoped=True),
    )


def make_encoder(hf: Any, segments: Tier | None = None, memory: Recent[str, np.ndarray] | None = None) -> Encode:
    """`encode` for a tokenizer: by segments kept in `memory` where that is exact, else over the whole text."""

    def whole(texts: list[str]) -> list[np.ndarray]:
        ids: list[np.ndarray] = []
        for batch in batches(texts, LONG_CHARS):
            if len(batch[0]) > LONG_CHARS:
                refuse_too_many_tokens(hf, batch[0], MOST_TOKENS)
            for encoding in encode_fast(hf, batch):
                if len(encoding) > MOST_TOKENS:
                    raise TooManyTokens(len(encoding), MOST_TOKENS)
                ids.append(np.asarray(encoding.ids, np.int32))
        return ids

    if not splits_at_added_tokens(hf):
        return lambda text, following=(): whole([text])[0]
    added = {str(token): index for index, token in hf.added_tokens_decoder.items()}
    single = {token: np.asarray([index], np.int32) for token, index in added.items()}
    # Longest first, as the tokenizer itself prefers them.
    cut = re.compile("|".join(re.escape(token) for token in sorted(added, key=len, reverse=True)))
    tokenize = with_store(whole, identity(hf), segments) if segments else whole
    memory = segment_memory(DEFAULT_BOUNDS.segments) if memory is None else memory

    def remembered(texts: list[str]) -> dict[str, np.ndarray]:
        known = {text: ids for text in texts if (ids := memory.get(text)) is not None}
        new = [text for text in dict.fromkeys(texts) if text not in known]
        for text, ids in zip(new, tokenize(new) if new else [], strict=True):
            memory.put(text, ids)
            known[text] = ids
        return known

    def parts_of(text: str) -> list[str]:  # texts and control tokens in turns
        at, parts = 0, list[str]()
        for found in cut.finditer(text):
            parts += [text[at : found.start()], found[0]]
            at = found.end()
        return [*parts, text[at:]]

    def encode(text: str, following: Sequence[str] = ()) -> np.ndarray:
        parts = parts_of(text)
        ids = single | remembered([part for each in (parts, *map(parts_of, following)) for part in each[::2] if part])
        return np.concatenate([np.zeros(0, np.int32), *(ids[part] for part in parts if part)])

    return encode


def segment_memory(most_bytes: int) -> Recent[str, np.ndarray]:
    """Memory for segments; bounded in bytes and not in number, as clients choose how long a segment is."""
    return Recent(most_bytes, lambda ids: NUMPY_BYTES + 2 * ids.nbytes, scoped=True)


def batches(texts: Iterable[str], most_chars: int) -> Iterator[list[str]]:
    """Texts in their order, as many at a time as have `most_chars` characters together; a longer one is alone."""
    batch, chars = list[str](), 0
    for text in texts:
        if batch and chars + len(text) > most_chars:
            yield batch
            batch, chars = [], 0
        batch.append(text)
        chars += len(text)
    if batch:
        yield batch


def encode_fast(hf: Any, texts: list[str]) -> list[Any]:
    """The encodings of texts by the fast call, which tracks no character offsets and exists for batches only."""
    encodings: list[Any] = hf.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return encodings


def remember_no_words(hf: Any) -> None:
    """Let a fast tokenizer keep no tokenised words, which would be tokenised sooner for whoever sends them next.

    Texts are remembered by `encode`, for each caller apart.
    """
    resize = getattr(hf.backend_tokenizer.model, "_resize_cache", None)  # BPE and Unigram have such a cache
    if resize is not None:
        resize(0)


def refuse_too_many_tokens(hf: Any, text: str, most: int) -> None:
    """Raise TooManyTokens for a text of far more than `most` tokens, without tokenising all of it.

    Cut into slices, a text has a few more tokens. Their number is estimated from the slices that were counted.
    """
    tokens = 0
    for start in range(0, len(text), COUNTED_TOGETHER):
        stop = min(start + COUNTED_TOGETHER, len(text))
        slices = [text[at : min(at + COUNTED_CHARS, stop)] for at in range(start, stop, COUNTED_CHARS)]
        tokens += sum(map(len, encode_fast(hf, slices)))
        if tokens > FAR_BEYOND * most:
            raise TooManyTokens(tokens * len(text) // stop, most)


def with_store(
    tokenize: Callable[[list[str]], list[np.ndarray]], tokenizer: bytes, tier: Tier
) -> Callable[[list[str]], list[np.ndarray]]:
    """`tokenize`, with its results for long texts kept in a tier under the tokenizer's identity and the text."""
    writer = Worker("segments")

    def recall(texts: list[str]) -> list[np.ndarray]:
        scope = f"\0{SCOPE.get()}\0".encode() if SCOPE.get() else b""
        keys = {
            text: hashlib.blake2b(tokenizer + scope + text.encode(), digest_size=32).digest()
            for text in texts
            if len(text) >= STORED_CHARS
        }
        records = dict(zip(keys, tier.get_many(list(keys.values())), strict=True)) if keys else {}
        ids = {
            text: np.frombuffer(record, "<i4").astype(np.int32)
            for text, record in records.items()
            if record is not None
        }
        new = [text for text in texts if text not in ids]
        ids |= zip(new, tokenize(new) if new else [], strict=True)
        if stored := [(keys[text], ids[text].astype("<i4").tobytes()) for text in new if text in keys]:
            writer.submit(tier.put_many, stored)
        return [ids[text] for text in texts]

    return recall


def identity(hf: Any) -> bytes:
    """A hash of all that decides a tokenizer's ids, its library's version included: 32 bytes."""
    described = f"{tokenizers.__version__}\n{hf.backend_tokenizer.to_str()}"
    return hashlib.blake2b(described.encode(), digest_size=32).digest()


def make_encoder_after(hf: Any, encode: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    """`encode_after` for a tokenizer. A special token before a text keeps away the space that its start may get."""
    anchors = [(str(t), i) for i, t in hf.added_tokens_decoder.items() if t.special and not (t.rstrip or t.single_word)]
    if splits_at_added_tokens(hf) or not anchors:
        return encode
    token, index = anchors[0]

    def encode_after(text: str) -> np.ndarray:
        ids = encode(token + text)
        return ids[1:] if len(ids) and ids[0] == index else encode(text)

    return encode_after


def splits_at_added_tokens(hf: Any) -> bool:
    """Whether tokenising the segments between added tokens gives the ids of the whole text.

    It does for byte-level tokenizers whose added tokens match verbatim. It does not for a tokenizer that puts a space
    before the first word only (Metaspace, Prepend), or whose added tokens include the whitespace around them.
    """
    tokens = hf.added_tokens_decoder.values()
    if not tokens or any(t.lstrip or t.rstrip or t.single_word or t.normalized for t in tokens):
        return False
    spec = json.loads(hf.backend_tokenizer.to_str())
    parts = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")])
    return not any(name in parts for name in ('"Metaspace"', '"Prepend"', '"Strip"', '"add_prefix_space": true'))
