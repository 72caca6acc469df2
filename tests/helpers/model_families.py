"""The main families of open models as tokenizers: their control tokens, and chat templates that behave as theirs do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from experiments.workloads.demo_model import SPLIT
from serve.prompt.tokenizer import Tokenizer, make_tokenizer

TEMPLATES = Path(__file__).parent / "templates"
# A few merges, so that most texts can be tokenised in more than one way.
MERGES = ("t h", "th e", "Ġ the", "i n", "r e", "Ġ a", "o n", "e r", "Ċ Ċ", '" :', "Ġ {", "a t", "e n", '" ,', "Ġ in")


@dataclass(frozen=True)
class Family:
    """What a family's tokenizer adds to the vocabulary, and what its models can do."""

    name: str  # of the template's file
    bos: str
    end: str
    special: tuple[str, ...]
    added: tuple[str, ...] = ()  # added to the vocabulary, and not special
    thinks: bool = False


MISTRAL_TOKENS = ("INST", "AVAILABLE_TOOLS", "TOOL_CALLS", "TOOL_RESULTS")
TOOL_PARTS = ("calls", "call", "outputs", "output")
HERMES = ("<tool_call>", "</tool_call>")
QWEN = ("<|endoftext|>", "<|im_start|>")
DEEPSEEK_TOOLS = tuple(f"<｜tool▁{what}▁{side}｜>" for what in TOOL_PARTS for side in ("begin", "end"))
FAMILIES = (
    Family("qwen2.5", "<|endoftext|>", "<|im_end|>", QWEN, HERMES),
    Family(
        "qwen3",
        "<|endoftext|>",
        "<|im_end|>",
        QWEN,
        (*HERMES, "<tool_response>", "</tool_response>", "<think>", "</think>"),
        thinks=True,
    ),
    Family(
        "llama3.1",
        "<|begin_of_text|>",
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"),
    ),
    Family(
        "mistral-v3",
        "<s>",
        "</s>",
        tuple(
            f"[{side}{word}]"
            for word in ("INST", "AVAILABLE_TOOLS", "TOOL_CALLS", "TOOL_RESULTS")
            for side in ("", "/")
        ),
    ),
    Family(
        "deepseek-r1",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>"),
        ("<think>", "</think>", "<｜tool▁sep｜>", *DEEPSEEK_TOOLS),
        thinks=True,
    ),
)

GLM = (
    ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    (
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
        *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
)
KIMI_TOOLS = ("tool_calls_section_begin", "tool_calls_section_end", "tool_call_begin", "tool_call_argument_begin")
# The families that agents run besides these.
AGENT_FAMILIES = (
    Family("glm-4.6", "<|endoftext|>", "<|user|>", *GLM, thinks=True),
    Family("glm-4.7", "<|endoftext|>", "<|user|>", *GLM, thinks=True),
    Family(
        "kimi-k2",
        "[BOS]",
        "<|im_end|>",
        ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>"),
        (*(f"<|{name}|>" for name in (*KIMI_TOOLS, "tool_call_end")), "<think>", "</think>"),
        thinks=True,
    ),
    Family(
        "minimax-m2",
        "]~!b[",
        "[e~[",
        ("]~b]",),
        ("<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>"),
        thinks=True,
    ),
    Family(
        "gpt-oss",
        "<|startoftext|>",
        "<|return|>",
        tuple(f"<|{name}|>" for name in ("start", "channel", "constrain", "message", "end", "call")),
        thinks=True,
    ),
    Family(
        "nemotron-nano",
        "<s>",
        "<SPECIAL_12>",
        ("<SPECIAL_10>", "<SPECIAL_11>"),
        ("<think>", "</think>", "<TOOLCALL>", "</TOOLCALL>", "<TOOL_RESPONSE>", "</TOOL_RESPONSE>"),
        thinks=True,
    ),
)


@cache
def tokenizer_of(family: Family) -> Tokenizer:
    """A byte-level tokenizer with the family's tokens and template."""
    merges = [(left, right) for left, right in (merge.split(" ") for merge in MERGES)]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    backend = Backend(models.BPE({word: i for i, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = (family.bos, family.end, *family.special)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in family.added])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=family.bos, eos_token=family.end)
    hf.chat_template = (TEMPLATES / f"{family.name}.jinja").read_text(encoding="utf-8")
    return make_tokenizer(hf)
