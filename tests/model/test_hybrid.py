"""Recurrent layers: logits against transformers' in float32, and the states that each way through a prompt leaves."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.decoder import forward, forward_draft, settle
from model.kv import empty_pool
from model.states import copy_slots, empty_states, gather_slots, scatter_slots
from tests.model.hybrids import HYBRIDS, NOWHERE, PAGE, SLOTS, Hybrid, compiled, make_batch, pages_of, random_hybrid
from tests.model.test_decoder import assert_equal_logits
from tests.model.test_kinds import expected

LENGTH = 150
RULES = ("qwen3_5_text", "nemotron_h")  # of a gated delta net, and of a Mamba-2: what others share is tested with these


class Case(NamedTuple):
    """A checkpoint, a prompt up to the first tie of its routers, and transformers' logits for it."""

    family: str
    folder: object
    prompt: np.ndarray
    logits: np.ndarray


@pytest.fixture(scope="module")
def case_of(tmp_path_factory):
    """The case of a family, made once."""
    made = {}

    def make(family, length=LENGTH):
        if (family, length) not in made:
            folder = made[family, LENGTH].folder if (family, LENGTH) in made else tmp_path_factory.mktemp(family)
            if not (folder / "config.json").exists():
                random_hybrid(family, **HYBRIDS[family]).save_pretrained(folder)
            prompt = np.random.default_rng(3).integers(3, 120, length)
            logits, count = expected(folder, tuple(prompt.tolist()))
            assert count > length * 0.8, "a tie in routing leaves too little to compare"
            made[family, length] = Case(family, folder, prompt[:count], logits[:count])
        return made[family, length]

    return make


@pytest.fixture(params=HYBRIDS)
def case(request, case_of):
    """Each family in turn."""
    return case_of(request.param)


@pytest.fixture(params=RULES)
def each_rule(request, case_of):
    """A case of a gated delta net, and one of a Mamba-2."""
    return case_of(request.param)


def assert_equal_states(actual, wanted):
    """Within 1e-5 of their scale."""
    assert np.abs(actual - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_logits_and_states_are_right_however_a_prompt_comes(case):
    hybrid, prompt, pages = Hybrid(case.folder), case.prompt, pages_of()
    assert_equal_logits(hybrid.in_chunks(prompt, 1024, pages), case.logits)
    whole = hybrid.state()
    for size in (7, 63, 64, 65):
        assert_equal_logits(hybrid.in_chunks(prompt, size, pages), case.logits)
        assert_equal_states(hybrid.state(), whole)
    hybrid.in_chunks(prompt[:101], 64, pages)
    assert_equal_logits(hybrid.in_chunks(prompt, 1, pages, prefix=101), case.logits[101:])
    assert_equal_states(hybrid.state(), whole)


@pytest.mark.parametrize(
    "family", [f if f == "qwen3_5_text" else pytest.param(f, marks=pytest.mark.slow) for f in HYBRIDS]
)
def test_a_prompt_of_several_chunks_of_1024_equals_transformers(family, case_of):
    case = case_of(family, 2100)
    hybrid = Hybrid(case.folder)
    assert_equal_logits(hybrid.in_chunks(case.prompt, 1024, pages_of(count=140)), case.logits)
    whole = hybrid.state()
    hybrid.in_chunks(case.prompt, 192, pages_of(count=140))
    assert_equal_states(hybrid.state(), whole)


@pytest.mark.parametrize("family", [f if f in RULES else pytest.param(f, marks=pytest.mark.slow) for f in HYBRIDS])
def test_a_ragged_batch_with_padding_equals_its_sequences_alone(family, case_of):
    """Two chunks, one of a fresh sequence, an empty place, a token that decodes, and padding, all at once."""
    case = case_of(family)
    hybrid, prompt, logits = Hybrid(case.folder), case.prompt, case.logits
    tables = pages_of(count=200).reshape(5, 40)
    hybrid.run(prompt[:9], 0, tables[0], write=1)
    hybrid.run(prompt[:50], 0, tables[3], write=2)
    before = np.asarray(gather_slots(hybrid.states, np.arange(SLOTS)))
    tokens = np.concatenate([prompt[9:90], prompt[:70], prompt[50:51], np.full(40, prompt[0])])
    found = hybrid.forward(
        make_batch(
            tokens,
            starts=[0, 81, 151, 151, 152, 152],
            prefix=[9, 0, 0, 50, 0],
            tables=tables,
            reads=[1, 1, 0, 2, 0],
            writes=[1, 3, 0, 4, 0],
            max_chunk=96,
            decode_seqs=2,
        )
    )
    wanted = np.concatenate([logits[9:90], logits[:70], logits[50:51]])
    assert_equal_logits(found[:152], wanted)
    after = np.asarray(gather_slots(hybrid.states, np.arange(SLOTS)))
    np.testing.assert_array_equal(after[[0, 2, 5]], before[[0, 2, 5]])
    for count, slot in ((90, 1), (70, 3), (51, 4)):
        hybrid.run(prompt[:count], 0, tables[4], write=0)
        assert_equal_states(after[slot], hybrid.state())


def test_a_copy_of_a_slot_is_not_changed_by_its_origins_going_on(each_rule):
    hybrid, prompt, pages = Hybrid(each_rule.folder), each_rule.prompt, pages_of()
    hybrid.run(prompt[:70], 0, pages)
    hybrid.states = copy_slots(hybrid.states, np.asarray([0, 0]), np.asarray([3, NOWHERE]))
    kept = hybrid.state()
    hybrid.in_chunks(prompt[:100], 192, pages, prefix=70)
    np.testing.assert_array_equal(hybrid.state(3), kept)
    assert np.abs(hybrid.state() - kept).max() > 0
    # A step that reads one slot and writes another copies, too, and a snapshot that was taken away comes back.
    hybrid.states = scatter_slots(hybrid.states, np.asarray([1, NOWHERE]), np.stack([kept, kept]))
    assert_equal_logits(hybrid.run(prompt[70:140], 70, pages, read=1, write=2), each_rule.logits[70:140])
    np.testing.assert_array_equal(hybrid.state(1), kept)


def test_tokens_of_a_draft_that_are_taken_back_leave_no_trace_in_a_state(each_rule):
    """Of each count of tokens that stay, the state is that of single steps; the slots that were read are as before."""
    hybrid, prompt = Hybrid(each_rule.folder), each_rule.prompt
    tables, drafted = pages_of(count=80).reshape(2, 40), 4
    for slot, count in ((0, 30), (1, 41)):
        hybrid.run(prompt[:count], 0, tables[slot], write=slot)
    wrong = np.full(2, 7)
    batch = make_batch(
        [*prompt[30:32], *wrong, *prompt[41:45]],
        starts=[0, drafted, 2 * drafted],
        prefix=[30, 41],
        tables=tables,
        reads=[0, 1],
        writes=[2, 3],
        max_chunk=drafted,
    )
    run = jax.jit(lambda params, batch, pool, states: forward_draft(params, batch, pool, hybrid.config, states))
    logits, hybrid.pool, trail = run(hybrid.params, batch, hybrid.pool, hybrid.states)
    assert_equal_logits(np.asarray(logits)[[0, 1, 4, 5, 6, 7]], each_rule.logits[[30, 31, 41, 42, 43, 44]])
    settled = jax.jit(
        lambda params, batch, counts, trail, states: settle(params, batch, counts, trail, states, hybrid.config)
    )
    before = hybrid.states
    for counts in ([1, 4], [2, 0]):
        hybrid.states = settled(hybrid.params, batch, np.asarray(counts, np.int32), trail, before)
        found = [hybrid.state(slot) for slot in (2, 3)]
        for slot, start, count in ((0, 30, counts[0]), (1, 41, counts[1])):
            assert_equal_states(hybrid.state(slot), np.asarray(gather_slots(before, np.asarray([slot])))[0])
            if not count:
                assert not found[slot].any()  # nothing was written
                continue
            hybrid.in_chunks(prompt[: start + count], 1, tables[slot], prefix=start, slot=slot)
            assert_equal_states(found[slot], hybrid.state(slot))


def test_stacked_layers_under_a_scan_give_the_same(case_of):
    each_rule = case_of("qwen3_5_text")
    config, _, _ = compiled(each_rule.folder)
    from model import checkpoint  # the weights as a GPU has them

    _, params = checkpoint.load(each_rule.folder, "float32")
    count = len(each_rule.prompt)
    batch = make_batch(each_rule.prompt, [0, count], [0], [pages_of()], [0], [5], max_chunk=count)
    pool = empty_pool(config, 400, PAGE, jnp.float32)
    step = jax.jit(lambda params, batch, pool, states: forward(params, batch, pool, config, None, states))
    logits, _, states = step(params, batch, pool, empty_states(config, SLOTS))
    assert_equal_logits(np.asarray(logits), each_rule.logits)
    hybrid = Hybrid(each_rule.folder)
    hybrid.run(each_rule.prompt, 0, pages_of())
    assert_equal_states(np.asarray(gather_slots(states, np.asarray([5])))[0], hybrid.state())


@pytest.mark.parametrize("family", [RULES[0], pytest.param(RULES[1], marks=pytest.mark.slow)])
def test_the_compiled_step_copies_no_states(family, case_of):
    hybrid = Hybrid(case_of(family).folder)
    states = jax.eval_shape(lambda: empty_states(hybrid.config, 4096))
    batch = make_batch(np.zeros(1), [0, 1], [5], [pages_of()], [3], [3], max_chunk=1)
    program = hybrid.step.lower(hybrid.params, batch, hybrid.pool, states).compile()
    assert program.memory_analysis().temp_size_in_bytes < states.recurrent.size  # a quarter of their bytes


def test_a_model_with_recurrent_layers_wants_states(each_rule):
    hybrid = Hybrid(each_rule.folder)
    batch = make_batch([5], [0, 1], [0], [pages_of()], [0], [0], max_chunk=1)
    with pytest.raises(ValueError, match="has recurrent layers: expected states"):
        forward(hybrid.params, batch, hybrid.pool, hybrid.config)
