"""Agreement of two engines: of one with itself, and of two whose logits are computed by hand."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.quality.agreement import ALL, agreement, agreements
from experiments.quality.scoring import Scorer, surprises
from experiments.quality.texts import PROSE, SOURCES, documents
from experiments.workloads.demo_model import TINY, write_demo_model
from model import checkpoint
from model.batch import Batch
from model.config import ModelConfig
from model.decoder import forward
from model.kernels.dispatch import arranged
from model.kv import empty_pool
from model.params import Params
from serve.prompt.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Params, Tokenizer]:
    folder = tmp_path_factory.mktemp("quality") / "demo"
    write_demo_model(folder, config=TINY)
    return *checkpoint.load(folder, "float32"), load_tokenizer(str(folder))


class Fixed:
    """Scores every text by the same logits, [tokens, vocab]."""

    def __init__(self, logits: np.ndarray) -> None:
        self.rows = logits

    def logits(self, tokens: np.ndarray) -> Iterator[jax.Array]:
        yield jnp.asarray(self.rows[: len(tokens)])


def test_logits_of_chunks_are_those_of_one_pass(demo: tuple[ModelConfig, Params, Tokenizer]) -> None:
    config, params, tokenizer = demo
    (tokens,) = documents(SOURCES, tokenizer.encode, 150, 1)
    batch = Batch(
        tokens=jnp.asarray(tokens),
        starts=jnp.asarray([0, 150], jnp.int32),
        prefix=jnp.zeros(1, jnp.int32),
        block_table=jnp.arange(3, dtype=jnp.int32)[None],
        logit_indices=jnp.arange(150, dtype=jnp.int32),
        max_chunk=150,
    )
    whole, _ = forward(params, batch, empty_pool(config, 3, 64, jnp.float32), config)
    chunks = [*Scorer(config, arranged(params, 64), chunk=64).logits(tokens)]
    assert [len(chunk) for chunk in chunks] == [64, 64, 22]
    np.testing.assert_allclose(np.concatenate(chunks), whole, atol=1e-4 * float(jnp.abs(whole).max()))


def test_an_engine_agrees_with_itself_on_both_kinds_of_text(demo: tuple[ModelConfig, Params, Tokenizer]) -> None:
    config, params, tokenizer = demo
    scorer = Scorer(config, arranged(params, 64), chunk=64)
    found = agreements(scorer, scorer, tokenizer.encode, tokens=400, document=100)
    assert [found[name].tokens for name in (SOURCES, PROSE, ALL)] == [198, 198, 396]
    for each in found.values():
        assert (each.kl, each.top1) == (0.0, 1.0)
        assert each.perplexity == each.other_perplexity
    (text,) = documents(PROSE, tokenizer.encode, 100, 1)
    assert agreement(scorer, scorer, [text]).perplexity == pytest.approx(np.exp(surprises(scorer, text).mean()))


def test_divergence_and_agreement_are_those_of_the_formulas() -> None:
    ours, theirs = np.log([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]), np.log([[0.25, 0.5, 0.25], [0.2, 0.1, 0.7]])
    found = agreement(Fixed(ours), Fixed(theirs), [np.asarray([0, 1, 2], np.int32)])  # type: ignore[arg-type]
    divergences = (np.exp(ours) * (ours - theirs)).sum(axis=1)
    assert found.tokens == 2
    assert found.kl == pytest.approx(divergences.mean(), rel=1e-5)
    assert found.top1 == 0.5
    assert found.perplexity == pytest.approx(np.exp(-np.mean([ours[0, 1], ours[1, 2]])), rel=1e-5)
    assert found.other_perplexity == pytest.approx(np.exp(-np.mean([theirs[0, 1], theirs[1, 2]])), rel=1e-5)


def test_texts_are_the_same_every_time_and_no_piece_is_short(demo: tuple[ModelConfig, Params, Tokenizer]) -> None:
    encode = demo[2].encode
    for kind in (SOURCES, PROSE):
        once, again = documents(kind, encode, 500, 3), documents(kind, encode, 500, 3)
        assert [len(text) for text in once] == [500] * 3
        np.testing.assert_array_equal(once, again)
        assert len({text.tobytes() for text in once}) == 3
    with pytest.raises(ValueError, match="kind is 'poems', expected one of sources, prose"):
        documents("poems", encode, 10, 1)
