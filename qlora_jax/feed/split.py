"""Holding out examples to evaluate on: seeded, and with no example on both sides.

Instruction sets repeat themselves. Copies (the same tokens) stay together, so that nothing held out was trained on.
"""

from collections.abc import Sequence

import numpy as np

from qlora_jax.data.examples import Example
from qlora_jax.errors import InputError
from qlora_jax.feed.store import digests_of, take


def split(examples: Sequence[Example], eval_examples: int, seed: int) -> tuple[Sequence[Example], Sequence[Example]]:
    """(train, heldout), each in the order of the file.

    Args:
      examples: all examples.
      eval_examples: how many to hold out. Fewer are, when copies that belong together do not fill the number.
      seed: the same seed and examples give the same split.

    Raises:
      InputError: nothing would be left to train on, or nothing could be held out.
    """
    if eval_examples < 0:
        raise InputError(f"data.eval_examples is {eval_examples}, expected 0 or more")
    if eval_examples == 0:
        return examples, []
    _, firsts, copies = np.unique(digests_of(examples), return_index=True, return_inverse=True)
    # groups of copies are numbered by the first of each, in the order of the file
    numbers = np.empty(len(firsts), np.int64)
    numbers[np.argsort(firsts)] = np.arange(len(firsts))
    groups = numbers[copies]
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
