"""Tokens to text: whole characters only, and nothing of a stop sequence."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from serve.api.stops import Stops
from serve.formats.families import NONE
from serve.formats.stream import AnswerEvent, AnswerStream, Stopped, Text, overlap

MERGES = [("a", "b"), ("ab", "c"), ("Ġ", "a"), ("Ã", "©"), ("ð", "Ł"), ("Ġ", "Ã"), ("©", "Ã")]


@cache
def backend() -> Tokenizer:
    """A byte-level tokenizer of 256 bytes and a few merges, one of them half a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(left + right for left, right in MERGES)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


def run(ids: list[int], stops: list[str] = ()) -> tuple[list[str], str | None]:
    """The events sent for these tokens, the last one what `finish` gave, and the stop sequence found."""
    stream, events = AnswerStream(backend(), NONE, Stops(stops)), []
    for token in ids:
        text, stop = text_and_stop(stream.feed(token))
        events.append(text)
        if stop is not None:
            return events, stop
    return [*events, text_and_stop(stream.finish())[0]], None


def text_and_stop(events: list[AnswerEvent]) -> tuple[str, str | None]:
    """The text of some events, and the stop sequence that ended them."""
    stops = [event.sequence for event in events if isinstance(event, Stopped)]
    return "".join(event.text for event in events if isinstance(event, Text)), stops[0] if stops else None


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What may be sent of a text, read character by character: it ends where a stop sequence is first complete."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


# Characters of one to four bytes; few letters, so that stop sequences occur and overlap.
LETTERS = st.sampled_from("abcé€🙂 ")
WORDS = st.text(LETTERS, max_size=40)


@given(text=st.text(max_size=60).filter(lambda text: "<|" not in text))  # a control token is no text
def test_the_pieces_of_any_text_join_to_the_text(text: str) -> None:
    events, stop = run(backend().encode(text).ids)
    assert "".join(events) == text
    assert stop is None


@given(text=st.text(st.characters(codec="utf-8") | st.sampled_from("\ufffdé🙂"), max_size=30))
def test_a_character_of_several_tokens_is_never_sent_in_part(text: str) -> None:
    # One token a byte: the worst split there is. What looks like half a character may be the model's own.
    ids = [backend().token_to_id(letter) for letter in byte_letters(text)]
    assert "".join(run(ids)[0]) == text
    half = backend().token_to_id("ð")
    assert "".join(run([*ids, half])[0]) == text


def byte_letters(text: str) -> str:
    """The byte-level alphabet's letters for the bytes of a text."""
    pairs, _ = (
        zip(*pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(text), strict=True) if text else ("", ())
    )
    return "".join(pairs)


@given(ids=st.lists(st.integers(0, 255 + len(MERGES) + 2), max_size=40))
def test_any_tokens_give_what_the_tokenizer_decodes(ids: list[int]) -> None:
    whole = backend().decode(ids, skip_special_tokens=True)
    events, _ = run(ids)
    text = "".join(events)
    assert whole.startswith(text)
    assert whole[len(text) :].strip("\ufffd") == "", "only half a character may be missing at the end"


def test_half_a_character_at_the_end_is_not_sent() -> None:
    first, second, *_ = [backend().token_to_id(letter) for letter in byte_letters("é€")]
    assert run([first, second]) == (["", "é", ""], None)
    assert run([first]) == (["", ""], None)


def test_what_stands_before_half_a_character_is_sent_at_once() -> None:
    # One token for a blank and the first byte of a character, as real vocabularies have them.
    ids = [backend().token_to_id(token) for token in ("a", "ĠÃ", "©", "b")]
    assert run(ids) == (["a", " ", "é", "b", ""], None)


@pytest.mark.parametrize("token", ["©", "ð", "ðŁ"])
def test_endless_broken_bytes_are_sent_and_cost_no_more_than_others(token: str) -> None:
    longest = 0

    class Watched:
        """The backend, with a record of the most tokens it decoded at once."""

        get_added_tokens_decoder, id_to_token = backend().get_added_tokens_decoder, backend().id_to_token

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return backend().decode(ids, skip_special_tokens=skip_special_tokens)

    ids = [backend().token_to_id(token)] * 500
    stream = AnswerStream(Watched(), NONE)
    events = [text_and_stop(stream.feed(index))[0] for index in ids]
    text = "".join(events)
    assert set(text) == {"\ufffd"}
    assert 490 < len(text) <= 500
    assert not ["" for at in range(480) if not "".join(events[at : at + 10])], "nothing is held back for long"
    assert longest < 20
    # And what follows is read as ever.
    rest = [text_and_stop(stream.feed(backend().token_to_id(letter)))[0] for letter in ("a", "Ã", "©")]
    assert "".join(rest).lstrip("\ufffd") == "aé"


def test_characters_that_never_end_with_a_token_are_whole() -> None:
    # Each token ends one character and begins the next.
    first, *middle, last = [backend().token_to_id(token) for token in ("Ã", *["©Ã"] * 40, "©")]
    events, _ = run([first, *middle, last])
    assert "".join(events) == "é" * 41


def sentencepiece() -> Tokenizer:
    """The decoder of a SentencePiece vocabulary with one letter and all bytes."""
    words = ["<unk>", "▁", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def test_bytes_of_a_sentencepiece_vocabulary_join_to_characters() -> None:
    tokenizer = sentencepiece()
    for text in ("a a", "🙂🙂é a €", "é" * 20, "a \ufffd"):
        tokens = [c if c == "a" else "▁" if c == " " else [f"<0x{b:02X}>" for b in c.encode()] for c in text]
        flat = [token for group in tokens for token in ([group] if isinstance(group, str) else group)]
        stream = AnswerStream(tokenizer, NONE)
        # As an answer begins: the blank before the first word belongs to the vocabulary, not to the text.
        events = [event for token in ["▁", *flat] for event in stream.feed(tokenizer.token_to_id(token))]
        assert text_and_stop(events + stream.finish())[0] == text


def test_an_answer_that_goes_on_keeps_its_first_space_and_the_rest_of_a_character() -> None:
    tokenizer = sentencepiece()
    for begun, rest, text in (
        (["▁", "a"], ["▁", "a"], " a"),
        (["a", "<0xC3>"], ["<0xA9>", "a"], "éa"),
        ([], ["▁", "a"], "a"),
    ):
        first, then = ([tokenizer.token_to_id(token) for token in tokens] for tokens in (begun, rest))
        stream = AnswerStream(tokenizer, NONE, begun=first)
        assert text_and_stop([event for token in then for event in stream.feed(token)])[0] == text


def test_tokens_that_the_tokenizer_does_not_know_add_nothing() -> None:
    letter = backend().token_to_id("a")
    assert run([letter, 99_999, letter]) == (["a", "", "a", ""], None)


def test_control_tokens_vanish_and_delimiters_stay() -> None:
    end, delimiter, letter = (backend().token_to_id(token) for token in ("<|end|>", "<think>", "a"))
    assert "".join(run([letter, end, delimiter, letter, end])[0]) == "a<think>a"


@given(text=WORDS, stops=st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3), data=st.data())
def test_the_answer_ends_before_the_first_stop_sequence(text: str, stops: list[str], data: st.DataObject) -> None:
    by_byte = data.draw(st.booleans(), label="one token a byte")
    ids = [backend().token_to_id(c) for c in byte_letters(text)] if by_byte else backend().encode(text).ids
    events, stop = run(ids, stops)
    assert ("".join(events), stop) == cut(text, stops)


@given(text=WORDS, stops=st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=3))
def test_nothing_is_held_back_that_cannot_become_a_stop_sequence(text: str, stops: list[str]) -> None:
    stream, sent = AnswerStream(backend(), NONE, Stops(stops)), ""
    for token in backend().encode(text).ids:
        more, stopped = text_and_stop(stream.feed(token))
        sent += more
        if stopped is not None:
            return
        known = stream.source.text
        longest = max((n for stop in stops for n in range(len(stop)) if known.endswith(stop[:n])), default=0)
        assert len(known) - len(sent) == longest
    assert sent + text_and_stop(stream.finish())[0] == text


def test_a_stop_sequence_over_several_tokens_is_found() -> None:
    events, stop = run(backend().encode("one abc two").ids, ["c t"])
    assert ("".join(events), stop) == ("one ab", "c t")


def test_of_two_stop_sequences_at_one_place_the_one_that_is_complete_first_ends_the_answer() -> None:
    events, stop = run(backend().encode("aabc").ids, ["abc", "ab"])
    assert ("".join(events), stop) == ("a", "ab")


@pytest.mark.parametrize(
    ("text", "stop", "size"), [("abab", "abc", 2), ("ab", "ab", 0), ("aa", "aab", 2), ("x", "y", 0), ("", "a", 0)]
)
def test_overlap_is_the_longest_proper_beginning_at_the_end(text: str, stop: str, size: int) -> None:
    assert overlap(text, stop) == size
