"""From text to tokens and a mask that says which of them are learned.

An example is two pieces, cut to length apart from each other (the QLoRA recipe): BOS and the source, cut at its end,
then the target and EOS, where the cut takes the target's tokens and never the EOS, so that the model learns to stop.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qlora_jax.data.formats import Text
from qlora_jax.errors import InputError
from qlora_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """tokens int32 [t]; loss_mask bool [t]: token t is a target, predicted from the tokens before it.

    `where` is the place of its row (`FILE, line N`).
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    where: str = ""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Truncated:
    """How many examples lost tokens, by piece."""

    sources: int = 0
    targets: int = 0

    def __add__(self, other: "Truncated") -> "Truncated":
        return Truncated(self.sources + other.sources, self.targets + other.targets)

    def report(self, config: Any) -> list[str]:
        """A line on it for a run's report, where there is something to say."""
        if not self.sources and not self.targets:
            return []
        return [
            f"data: cut to length: {self.sources:,} sources (max_source_len {config.max_source_len}), "
            f"{self.targets:,} targets (max_target_len {config.max_target_len})"
        ]


def tokenize_example(
    source: str,
    target: str,
    tokenizer: Tokenizer,
    max_source_len: int,
    max_target_len: int,
    train_on_source: bool = False,
    where: str = "",
) -> Example:
    """One example; see `tokenize_examples`."""
    texts = [Text(source, target, where)]
    return tokenize_examples(texts, tokenizer, max_source_len, max_target_len, train_on_source)[0][0]


def tokenize_examples(
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    max_source_len: int,
    max_target_len: int,
    train_on_source: bool = False,
) -> tuple[list[Example], Truncated]:
    """Examples of texts, in their order.

    Args:
      texts: source and target, the target not blank; an empty source leaves BOS alone before the target.
      tokenizer: gives the ids; without a BOS of its own the source piece is the source alone.
      max_source_len: tokens of the first piece, BOS included.
      max_target_len: tokens of the second piece, EOS included.
      train_on_source: the source is learned too (the very first token never is: nothing predicts it).

    Raises:
      InputError: a length leaves no room for a token of text, or a target has no tokens.
    """
    if max_source_len < 1:
        raise InputError(f"data.max_source_len is {max_source_len}, expected at least 1 (BOS)")
    if max_target_len < 2:
        raise InputError(f"data.max_target_len is {max_target_len}, expected at least 2 (a token and EOS)")
    sources = tokenizer.encode_batch([text.source for text in texts])
    targets = tokenizer.encode_batch([text.target for text in texts])
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    examples = []
    cut_sources = cut_targets = 0
    for text, source, target in zip(texts, sources, targets, strict=True):
        if not text.target.strip() or not target:
            raise InputError(f"{text.where}: the target is empty: there is nothing to learn")
        first, second = bos + source, [*target[: max_target_len - 1], tokenizer.eos_id]
        cut_sources += len(first) > max_source_len
        cut_targets += len(target) > max_target_len - 1
        first = first[:max_source_len]
        loss_mask = np.ones(len(first) + len(second), np.bool_)
        loss_mask[: 1 if train_on_source else max(len(first), 1)] = False
        examples.append(Example(np.asarray(first + second, np.int32), loss_mask, text.where))
    return examples, Truncated(cut_sources, cut_targets)
