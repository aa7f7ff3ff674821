"""Holding out examples to evaluate on: seeded, and with no example on both sides.

Instruction sets repeat themselves. Copies (the same tokens) stay together, so that nothing held out was trained on.
"""

from collections.abc import Sequence

import numpy as np

from qlora_jax.data.examples import Example
from qlora_jax.errors import InputError


def split(examples: Sequence[Example], eval_examples: int, seed: int) -> tuple[list[Example], list[Example]]:
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
        return list(examples), []
    copies: dict[bytes, list[int]] = {}
    for number, example in enumerate(examples):
        copies.setdefault(example.tokens.tobytes(), []).append(number)
    groups = list(copies.values())
    held: set[int] = set()
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    for index in random.permutation(len(groups)):
        if len(held) + len(groups[index]) <= eval_examples:
            held.update(groups[index])
    if len(held) == len(examples):
        raise InputError(
            f"data.eval_examples is {eval_examples} and there are {len(examples)} examples: nothing is left to train "
            "on; hold out fewer"
        )
    if not held:
        raise InputError(
            f"data.eval_examples is {eval_examples}, but every one of the {len(groups)} distinct examples is there "
            "more often than that: no example can be held out; hold out more, or 0"
        )
    train = [example for number, example in enumerate(examples) if number not in held]
    return train, [example for number, example in enumerate(examples) if number in held]
