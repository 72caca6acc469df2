"""A model that is too big for its device: by how much, and which flags would make it fit."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from serve.server.config import ServerConfig
from serve.server.fit import Choice, Sizes, problem, what_fits
from serve.server.loading import load_model
from serve.server.progress import StartProgress

GIB = 1 << 30
# As many bytes as a model of 8 GiB in 16 bits, whose tokens have 128 KiB of keys and values.
WEIGHTS = {None: 8 * GIB, "int8": 4 * GIB + GIB // 4, "int4": 2 * GIB + GIB // 2}
TOKEN = {None: 128 << 10, "int8": 66 << 10, "fp8": 66 << 10}
SIZES = Sizes(10 * GIB, WEIGHTS.__getitem__, TOKEN.__getitem__, page_size=64)


def fitting(limit: float, given: Choice) -> list[str]:
    """The flags that would make it fit a device of so many GiB."""
    sizes = replace(SIZES, limit=int(limit * GIB))
    found = what_fits(sizes, given)
    assert all(sizes.needed(choice) <= sizes.limit < sizes.needed(given) for choice in found)
    return [choice.flags(given) for choice in found]


def test_what_fits_is_no_problem():
    assert problem("m", SIZES, Choice()) is None
    assert problem("m", SIZES, Choice(max_model_len=16_000)) is None


def test_a_context_that_is_too_long_fits_when_it_is_shorter_or_in_less_bits():
    assert fitting(10, Choice(max_model_len=20_000)) == [
        "--max-model-len 16320",
        "--kv-dtype int8",
        "--quantize int8",
        "--quantize int4",
    ]


def test_weights_that_are_too_big_fit_in_less_bits_only():
    assert fitting(6, Choice()) == ["--quantize int8", "--quantize int4"]
    assert fitting(3, Choice()) == ["--quantize int4"]
    assert fitting(3, Choice(quantize="int8", kv_dtype="int8")) == ["--quantize int4"]


def test_flags_are_combined_where_none_is_enough():
    assert fitting(3.6, Choice(max_model_len=16_384)) == [
        "--max-model-len 8896 --quantize int4",
        "--kv-dtype int8 --quantize int4",
    ]


def test_the_longest_context_is_the_last_that_fits():
    longest = SIZES.longest(Choice())
    assert problem("m", SIZES, Choice(max_model_len=longest)) is None
    assert problem("m", SIZES, Choice(max_model_len=longest + 1)) is not None


def test_the_problem_says_by_how_much_and_what_to_do():
    found = problem("some/model", replace(SIZES, limit=6 * GIB), Choice())
    assert found is not None
    assert re.search(
        r"some/model takes 8\.0 GiB of weights and 16\.0 MiB of KV pages on a device, 2\.0 GiB more", found
    )
    assert found.endswith("than the 6.0 GiB that it has for them: it fits with --quantize int8 or with --quantize int4")
    nothing = problem("some/model", replace(SIZES, limit=GIB), Choice())
    assert nothing is not None
    assert nothing.endswith("makes it fit: use a smaller model, or --tp for more devices")


def test_a_pool_of_a_given_size_is_counted_as_it_is():
    sizes = replace(SIZES, pool=4 * GIB)
    assert [choice.flags(Choice()) for choice in what_fits(sizes, Choice())] == ["--quantize int8", "--quantize int4"]


@pytest.mark.parametrize("given", [Choice("int4"), Choice("int4", "int8")])
def test_what_is_in_few_bits_already_is_not_advised_more(given):
    assert fitting(2, given) == []


def test_a_model_with_recurrent_layers_is_refused_in_a_sentence_before_its_weights_are_looked_for(tmp_path):
    fields = {"model_type": "nemotron_h", "vocab_size": 8, "hidden_size": 32, "hybrid_override_pattern": "ME*-"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    refusal = "is a nemotron_h model, 1 of whose 4 layers are recurrent: the server does not keep their states yet"
    with pytest.raises(ValueError, match=refusal):
        load_model(ServerConfig(model=str(tmp_path)), tmp_path, StartProgress())
