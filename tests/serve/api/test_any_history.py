"""Histories of any kind are read: a small part of what `python -m tests.helpers.any_history` tries."""

import json
from itertools import islice
from random import Random

from serve.api.messages import decode_request
from tests.helpers.any_history import anthropic_requests, refusal
from tests.helpers.model_families import FAMILIES, tokenizer_of


def test_no_history_of_the_sdks_types_is_refused() -> None:
    tokenizers = [tokenizer_of(family) for family in FAMILIES]
    for n, request in enumerate(islice(anthropic_requests(Random(1)), 300)):
        assert refusal(request, tokenizers[n % len(tokenizers)], decode_request) is None, json.dumps(request)
