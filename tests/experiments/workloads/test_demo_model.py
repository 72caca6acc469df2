"""The demo checkpoint: what any Hugging Face loader reads, and what a chat renders to."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from experiments.workloads import demo_model
from experiments.workloads.demo_model import CONTROLS, FILES, MARKS, TINY, source_files, source_text, write_demo_model

TOOLS = [{"type": "function", "function": {"name": "Read", "parameters": {"type": "object", "required": ["é"]}}}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Look."},
    {
        "role": "assistant",
        "content": "Reading.",
        "reasoning_content": "two files",
        "tool_calls": [
            {"type": "function", "function": {"name": "Read", "arguments": {"path": "ü.py", "limit": 2}}},
            {"name": "Read", "arguments": '{"path":"b"}'},
        ],
    },
    {"role": "tool", "content": "1\tx"},
    {"role": "tool", "content": [{"type": "text", "text": "2\ty"}]},
    {"role": "system", "content": "Half of the tokens are left."},
    {"role": "assistant", "content": "  Done.\n", "reasoning_content": ""},
    {"role": "user", "content": "Thanks"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "model"
    assert write_demo_model(path, config=TINY)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def render(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def test_source_text_comes_back_byte_for_byte(tokenizer):
    text = "".join(source_text(path) for path in source_files()[:100:20])
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text())
def test_any_unicode_text_comes_back_byte_for_byte(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_single_ids_and_the_last_of_the_vocabulary(tokenizer):
    ids = [tokenizer.encode(f"a{token}b")[1:-1] for token in CONTROLS + MARKS]
    assert [len(found) for found in ids] == [1] * len(ids)
    assert [found[0] for found in ids] == list(range(len(tokenizer) - len(ids), len(tokenizer)))
    assert tokenizer.eos_token == "<|im_end|>"


def test_control_tokens_vanish_from_decoded_text_and_marks_stay(tokenizer):
    ids = tokenizer.encode("<think>a</think><tool_call>b</tool_call><|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>a</think><tool_call>b</tool_call>"


def test_digits_are_split(tokenizer):
    assert len(tokenizer.encode("2026")) == 4


def test_chat_renders_in_the_manner_of_qwen(tokenizer):
    head, tail = render(tokenizer, CHAT, tools=TOOLS, add_generation_prompt=True).split("<|im_end|>\n", 1)
    assert head.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\n")
    assert json.loads(head.split("<tools>\n")[1].split("\n</tools>")[0]) == TOOLS[0]
    assert "é" in head
    assert tail == (
        "<|im_start|>user\nLook.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\ntwo files\n</think>\n\nReading.\n"
        '<tool_call>\n{"name": "Read", "arguments": {"path": "ü.py", "limit": 2}}\n</tool_call>\n'
        '<tool_call>\n{"name": "Read", "arguments": {"path":"b"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\tx\n</tool_response>\n"
        "<tool_response>\n2\ty\n</tool_response><|im_end|>\n"
        "<|im_start|>system\nHalf of the tokens are left.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n  Done.\n<|im_end|>\n"
        "<|im_start|>user\nThanks<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_tools_without_a_system_message_get_a_system_turn(tokenizer):
    assert render(tokenizer, CHAT[1:2], tools=TOOLS).startswith("<|im_start|>system\n# Tools\n\n")


def test_a_chat_may_open_with_the_user(tokenizer):
    assert render(tokenizer, CHAT[1:2]) == "<|im_start|>user\nLook.<|im_end|>\n"


def test_thinking_is_switched_off_by_an_empty_block(tokenizer):
    options = {"add_generation_prompt": True, "enable_thinking": False}
    assert render(tokenizer, CHAT[:2], **options).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 7])  # not 4: the turn of tool results is still open there
def test_a_longer_history_extends_the_shorter_one(tokenizer, length):
    assert render(tokenizer, CHAT, tools=TOOLS).startswith(render(tokenizer, CHAT[:length], tools=TOOLS))


@pytest.mark.parametrize("thinking", [None, ""])
def test_a_recorded_answer_extends_the_prompt_that_asked_for_it(tokenizer, thinking):
    answer = {"role": "assistant", "content": "Yes."} | ({} if thinking is None else {"reasoning_content": thinking})
    options = {} if thinking is None else {"enable_thinking": False}
    prompt = render(tokenizer, CHAT, add_generation_prompt=True, **options)
    assert render(tokenizer, [*CHAT, answer], **options) == prompt + "Yes.<|im_end|>\n"


def test_transformers_loads_every_weight_and_greedy_output_wanders(folder, tokenizer):
    import torch
    from transformers import Qwen3ForCausalLM

    model, loading = Qwen3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    prompt = torch.tensor([tokenizer.encode("def main() -> None:\n")])
    new = model.generate(prompt, max_new_tokens=20, min_new_tokens=20, do_sample=False)[0, prompt.shape[1] :]
    assert len(new) == 20
    assert len(set(new.tolist())) > 10
    assert 1 < model(prompt).logits[0, -1].std() < 5
    first = new[0].item()
    assert first < len(tokenizer) - len(CONTROLS + MARKS), "the first token is a special one"


def test_equal_seeds_write_equal_bytes_and_other_seeds_other_weights(folder, tmp_path):
    write_demo_model(tmp_path / "same", config=TINY)
    write_demo_model(tmp_path / "other", seed=1, config=TINY)
    for name in FILES:
        assert (tmp_path / "same" / name).read_bytes() == (folder / name).read_bytes()
    assert (tmp_path / "other/model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()


def test_a_complete_checkpoint_is_left_alone_unless_forced(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    for name in FILES:
        (path / name).write_text("kept")
    assert not write_demo_model(path, config=TINY)
    assert (path / "config.json").read_text() == "kept"
    assert write_demo_model(path, config=TINY, force=True)
    assert json.loads((path / "config.json").read_text())["model_type"] == "qwen3"


def test_a_partial_checkpoint_is_replaced(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{")
    assert write_demo_model(path, config=TINY)
    assert sorted(entry.name for entry in path.iterdir()) == sorted(FILES)


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "weights", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_demo_model(tmp_path / "model", config=TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        write_demo_model(tmp_path, config=TINY, force=True)
    assert (tmp_path / "thesis.tex").exists()
