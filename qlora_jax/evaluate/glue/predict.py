"""What an encoder says of rows: its logits, in batches of like lengths."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from qlora_jax.data.examples import Example
from qlora_jax.errors import InputError
from qlora_jax.feed.batches import round_up
from qlora_jax.models.roberta.encoder import Encoder

_BATCH_TOKENS = 8192  # of a batch, where its size is not given
_STEP = 32  # tokens: lengths are rounded up to multiples of it, which bounds the programs


@partial(jax.jit, static_argnames="graph")
def _classes(graph: Any, state: Any, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    return nnx.merge(graph, state).classes(tokens, lengths)


def logits_of(
    model: Encoder,
    examples: Sequence[Example],
    batch_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """float32 [n, labels] of examples (data/glue/examples), in their order; their labels are not looked at.

    batch_size: rows computed together; what makes 8,192 tokens of the longest by default.
    progress: called with (rows done, rows in all).

    Raises InputError for a model without a head, or logits that are not finite.
    """
    graph, state = nnx.split(model)
    sizes = np.array([len(example) - 1 for example in examples])
    B = min(batch_size or max(1, _BATCH_TOKENS // round_up(int(sizes.max()), _STEP)), len(examples))
    order = np.argsort(-sizes, kind="stable")
    found: list[np.ndarray] = []
    for first in range(0, len(order), B):
        some = order[first : first + B]
        tokens, lengths = np.zeros((B, round_up(int(sizes[some[0]]), _STEP)), np.int32), np.ones(B, np.int32)
        for row, index in enumerate(some.tolist()):
            lengths[row] = sizes[index]
            tokens[row, : lengths[row]] = examples[index].tokens[:-1]
        found.append(np.asarray(_classes(graph, state, tokens, lengths))[: len(some)])
        progress(first + len(some), len(order))
    logits = np.concatenate(found)
    if not np.isfinite(logits).all():
        bad = examples[int(order[int(np.argmax(~np.isfinite(logits).all(axis=1)))])].where
        raise InputError(f"{bad}: the model's output is not finite: its weights or the adapter are broken")
    return logits[np.argsort(order)]
