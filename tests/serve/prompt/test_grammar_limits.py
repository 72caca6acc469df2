"""A grammar that takes too long, is too large or fails is refused once and for all, and holds up nobody else's."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from serve.api.messages import InvalidRequest, decode_request
from serve.limits.exceeded import LimitExceeded
from serve.prompt import masks
from serve.prompt.masks import Constrainer, Constraint, ConstraintError, Turns, constraint_of, make_constrainer
from serve.prompt.tokenizer import Tokenizer
from tests.helpers.http import ask

NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 2}


def constrainer_of(tokenizer: Tokenizer, **limits: Any) -> Constrainer:
    """A new constrainer of a tokenizer, which has compiled nothing yet."""
    return make_constrainer(tokenizer.hf, {tokenizer.hf.eos_token_id}, len(tokenizer.hf), **limits)


def constrained(constrainer: Constrainer, tokenizer: Tokenizer, *schemas: Any) -> Constraint:
    """The constraint of an answer that is JSON by a schema, or calls of tools with several."""
    if len(schemas) == 1:
        fields: dict[str, Any] = {"output_config": {"format": {"type": "json_schema", "schema": schemas[0]}}}
    else:
        tools = [{"name": f"t{n}", "input_schema": schema} for n, schema in enumerate(schemas)]
        fields = {"tools": tools, "tool_choice": {"type": "any"}}
    request = decode_request(json.dumps(ask("go") | fields).encode())
    constraint = constraint_of(request, constrainer, tokenizer.template.format, False)
    assert constraint
    return constraint


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are compiled from now on."""
    texts: list[str] = []
    compile = masks.compile_grammar

    def count(text: str, *args: Any) -> Any:
        texts.append(text)
        return compile(text, *args)

    monkeypatch.setattr(masks, "compile_grammar", count)
    return texts


def test_a_grammar_that_does_not_compile_is_tried_once(tokenizer: Tokenizer, compiled: list[str]) -> None:
    constrainer = constrainer_of(tokenizer)
    for _ in range(3):
        with pytest.raises(ConstraintError):
            constrainer.compile('start: "never\n')
    assert len(compiled) == 1


def test_a_grammar_that_fails_in_the_middle_of_an_answer_is_not_used_again(tokenizer: Tokenizer) -> None:
    constrainer = constrainer_of(tokenizer)
    constraint = constrained(constrainer, tokenizer, NUMBERS)

    class Failed:
        """A matcher that has hit a limit."""

        compute_bitmask = staticmethod(lambda: bytes(4 * constraint.words))
        is_error = staticmethod(lambda: True)
        get_error = staticmethod(lambda: "lexer error: too many expressions constructed")

    constraint.matcher = Failed()  # type: ignore[assignment]
    with pytest.raises(ConstraintError):
        constraint.mask()
    with pytest.raises(InvalidRequest, match="too many expressions constructed"):
        constrained(constrainer, tokenizer, NUMBERS)
    assert constrained(constrainer, tokenizer, NUMBERS | {"minItems": 3}).mask().any()


def test_schemas_that_take_too_long_together_are_refused_and_not_compiled_again(
    tokenizer: Tokenizer, compiled: list[str]
) -> None:
    constrainer = constrainer_of(tokenizer, most_seconds=1e-6)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=r"take more than 1e-06 s to compile: .* --grammar-seconds") as refused:
            constrained(constrainer, tokenizer, *({"minProperties": n} for n in range(20)))
        assert refused.value.limit == "grammar_seconds"
    assert len(compiled) == 1


def test_schemas_that_are_too_long_together_are_refused_by_the_flag(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"expected at most 100 characters of schemas, got .* --max-grammar-chars"):
        constrained(constrainer_of(tokenizer, most_chars=100), tokenizer, {"enum": ["x" * 100]})


@pytest.mark.parametrize("multiple", [9973, 49_999, 99_991])
@pytest.mark.parametrize("kind", ["integer", "number"])
def test_a_multiple_that_could_fail_in_the_middle_of_an_answer_is_refused(
    tokenizer: Tokenizer, kind: str, multiple: int
) -> None:
    with pytest.raises(InvalidRequest, match=rf"multipleOf with a common multiple of at most 5000, got {multiple}"):
        constrained(constrainer_of(tokenizer), tokenizer, {"type": kind, "multipleOf": multiple})


def test_few_requests_wait_for_their_turn_to_compile() -> None:
    turns = Turns()
    for _ in range(masks.MOST_WAITING):
        assert turns.places.acquire(blocking=False)
    started = time.monotonic()
    with turns.turn(), pytest.raises(LimitExceeded, match="try again") as refused, turns.turn():
        pass
    assert time.monotonic() - started < 5
    assert (refused.value.status, refused.value.limit) == (529, "waiting_grammars")
    with turns.turn():
        pass
