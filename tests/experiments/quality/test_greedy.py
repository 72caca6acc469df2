"""Greedy answers beside others: where they differ, and how near the two tokens were."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.quality.greedy import differences, summary, table


class Rising:
    """Expects token i with a logit of i / 10, whatever came before."""

    def logits(self, tokens: np.ndarray) -> Iterator[jax.Array]:
        yield jnp.broadcast_to(jnp.arange(11) / 10, (len(tokens), 11))


def test_a_difference_is_the_first_one_with_the_gap_of_our_logits() -> None:
    prompts = [np.asarray([1, 2], np.int32)] * 3
    ours, theirs = [[9, 8, 7], [9, 8, 7], [5, 6, 7]], [[9, 8, 7], [9, 6, 1], [4]]
    found = differences(ours, theirs, prompts, Rising())  # type: ignore[arg-type]
    assert [(each.prompt, each.after) for each in found] == [(1, 1), (2, 0)]
    np.testing.assert_allclose([each.gap for each in found], [0.2, 0.1], rtol=1e-6)
    row = summary(found, 3, 3)
    assert (row["same"], row["tokens_before_a_difference"], row["ties"]) == (1, 4, 0)
    result = {"prompts": 3, "tokens": 3, "sides": {"them": row}}
    assert table(result).row_count == 1
    assert summary([], 3, 3)["tokens_before_a_difference"] == 9
