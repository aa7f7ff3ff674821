"""Holding out examples to evaluate on: seeded, and with no example on both sides.

Instruction sets repeat themselves. Copies (the same tokens) stay together, so that nothing held out was trained on.
So do the examples of one chat: a later answer's prompt shows the earlier ones.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from qlora_jax.data.examples import Example
from qlora_jax.errors import InputError
from qlora_jax.feed.store import digests_of, rows_of, take


def split(
    examples: Sequence[Example], eval_examples: int, seed: int, whole_rows: bool = False
) -> tuple[Sequence[Example], Sequence[Example]]:
    """(train, heldout), each in the order of the file.

    Args:
      examples: all examples.
      eval_examples: how many to hold out. Fewer are, when copies that belong together do not fill the number.
      seed: the same seed and examples give the same split.
      whole_rows: the examples of a row of the file stay together.

    Raises:
      InputError: nothing would be left to train on, or nothing could be held out.
    """
    if eval_examples < 0:
        raise InputError(f"data.eval_examples is {eval_examples}, expected 0 or more")
    if eval_examples == 0:
        return examples, []
    groups = digests_of(examples)
    if whole_rows:
        groups = _joined(groups, rows_of(examples))
    # groups are numbered by the first of each, in the order of the file
    _, firsts, members = np.unique(groups, return_index=True, return_inverse=True)
    numbers = np.empty(len(firsts), np.int64)
    numbers[np.argsort(firsts)] = np.arange(len(firsts))
    groups = numbers[members]
    sizes = np.bincount(groups)
    chosen: list[int] = []
    held = 0
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    for group in random.permutation(len(sizes)):
        if held + sizes[group] <= eval_examples:
            chosen.append(group)
            held += sizes[group]
        if held == eval_examples:
            break
    if held == len(examples):
        raise InputError(
            f"data.eval_examples is {eval_examples} and there are {len(examples)} examples: nothing is left to train "
            "on; hold out fewer"
        )
    if not held:
        raise InputError(
            f"data.eval_examples is {eval_examples}, but every one of the {len(sizes)} distinct examples is there "
            "more often than that: no example can be held out; hold out more, or 0"
        )
    is_held = np.isin(groups, chosen)
    return take(examples, np.flatnonzero(~is_held)), take(examples, np.flatnonzero(is_held))


def _joined(*kinds: np.ndarray) -> np.ndarray:
    """Groups of what is connected by any of the groups in `kinds`, each [n] of any numbers: int [n]."""
    n = len(kinds[0])
    edges, nodes = [], n  # each example to a node of each of its groups
    for kind in kinds:
        names, members = np.unique(kind, return_inverse=True)
        edges.append(nodes + members)
        nodes += len(names)
    ends = np.tile(np.arange(n), len(kinds)), np.concatenate(edges)
    graph = coo_array((np.ones(len(ends[0]), np.int8), ends), (nodes, nodes))
    return connected_components(graph, directed=False)[1][:n]
