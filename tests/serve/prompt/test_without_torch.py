"""Tokenizers in a process that leaves torch out: the same class, token ids and prompts as with it."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import cycle
from pathlib import Path

from transformers import AutoTokenizer

from tests.helpers.model_families import AGENT_FAMILIES, FAMILIES, tokenizer_of

ARCHITECTURES = ("qwen3", "qwen2", "llama", "mistral")  # which decide the class, too
TEXT = "The thing in the air: naïve 日本 {}\n\n 12345  <think>x</think>"
TURNS = [{"role": "user", "content": TEXT}]
SCRIPT = """
import json, sys
from serve.engine.runtime import leave_out_torch
leave_out_torch()
from serve.prompt.tokenizer import load_tokenizer
for folder in sys.argv[3:]:
    hf = load_tokenizer(folder).hf
    prompt = hf.apply_chat_template(json.loads(sys.argv[2]), tokenize=False, add_generation_prompt=True)
    print(json.dumps([type(hf).__name__, hf(sys.argv[1])["input_ids"], prompt]))
assert sys.modules["torch"] is None
"""


def test_every_family_has_the_class_ids_and_prompts_that_it_has_with_torch(tmp_path: Path) -> None:
    folders = []
    for family, architecture in zip((*FAMILIES, *AGENT_FAMILIES), cycle(ARCHITECTURES), strict=False):
        folders.append(tmp_path / family.name)
        tokenizer_of(family).hf.save_pretrained(folders[-1])
        (folders[-1] / "config.json").write_text(json.dumps({"model_type": architecture}))
    command = [sys.executable, "-c", SCRIPT, TEXT, json.dumps(TURNS), *map(str, folders)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "PyTorch" not in ran.stderr
    for folder, line in zip(folders, ran.stdout.splitlines(), strict=True):
        hf = AutoTokenizer.from_pretrained(folder)
        prompt = hf.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
        assert json.loads(line) == [type(hf).__name__, hf(TEXT)["input_ids"], prompt], folder.name
