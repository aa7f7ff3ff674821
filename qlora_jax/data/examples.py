"""From text to tokens and a mask that says which of them are learned.

An example is two pieces (the QLoRA recipe): BOS and the source, cut at its end, then the target and EOS. EOS is part of
the target and goes first when that is cut: only an answer that is whole teaches the model to stop. Of an
encoder-decoder (T5) the source is its text and EOS, which stays when the text is cut.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qlora_jax.data.formats import Text
from qlora_jax.errors import InputError
from qlora_jax.text.tokenizer import Tokenizer

UNBOUNDED = 2**31 - 1  # tokens, for a model whose context is not known


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
class Lengths:
    """How long examples may be, in tokens.

    Attributes:
      max_source_len: of the source, BOS included; 0 does not cut it.
      max_target_len: of the target, EOS included; 0 takes it as long as it is.
      context: of both together where one of them is 0: what the model was made for. Without meaning where both are
        given.
    """

    max_source_len: int
    max_target_len: int
    context: int = UNBOUNDED

    @classmethod
    def of(cls, data: Any, context: int | None = None) -> "Lengths":
        """By the config's `data` section; `context` is the model's, None where it is not known.

        Raises InputError for a length that leaves no room for a token of text.
        """
        if data.max_source_len < 0:
            raise InputError(
                f"data.max_source_len is {data.max_source_len}, expected at least 1 (BOS), or 0: as long as sources are"
            )
        if data.max_target_len < 0 or data.max_target_len == 1:
            raise InputError(
                f"data.max_target_len is {data.max_target_len}, expected at least 2 (a token and EOS), or 0: as long "
                "as targets are"
            )
        return cls(data.max_source_len, data.max_target_len, UNBOUNDED if context is None else context)

    @property
    def are_given(self) -> bool:
        """Whether the config alone says how long an example may be."""
        return self.max_source_len > 0 and self.max_target_len > 0

    @property
    def room(self) -> int:
        """Tokens of a whole example."""
        return self.max_source_len + self.max_target_len if self.are_given else self.context

    def target_room(self, source: int) -> int:
        """Tokens that are left for the target after a source of so many."""
        longest = self.max_target_len or UNBOUNDED
        return longest if self.are_given else min(longest, self.context - source)

    def __str__(self) -> str:
        if self.are_given:
            return f"data.max_source_len + data.max_target_len = {self.room:,} tokens"
        return f"the model's context of {self.context:,} tokens"


@dataclasses.dataclass(frozen=True)
class Truncated:
    """How many examples lost tokens, by piece, and how many had no room for a token to learn and are left out."""

    sources: int = 0
    targets: int = 0
    dropped: int = 0

    def __add__(self, other: "Truncated") -> "Truncated":
        return Truncated(self.sources + other.sources, self.targets + other.targets, self.dropped + other.dropped)

    def report(self, lengths: Lengths) -> list[str]:
        """Lines on it for a run's report, each only where there is something to say."""
        lines = []
        if self.sources or self.targets:
            bounds = [f"max_target_len {lengths.max_target_len}"] if lengths.max_target_len else []
            bounds += [] if lengths.are_given else [str(lengths)]
            sources = f"{self.sources:,} sources (max_source_len {lengths.max_source_len}), "
            lines.append(
                f"data: cut to length: {sources if lengths.max_source_len else ''}{self.targets:,} targets "
                f"({', '.join(bounds)}), which are learned without an end"
            )
        if self.dropped:
            lines.append(f"data: {self.dropped:,} examples left out: nothing to learn within {lengths}")
        return lines


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
    return tokenize_examples(texts, tokenizer, Lengths(max_source_len, max_target_len), train_on_source)[0][0]


def tokenize_examples(
    texts: Sequence[Text],
    tokenizer: Tokenizer,
    lengths: Lengths,
    train_on_source: bool = False,
) -> tuple[list[Example], Truncated]:
    """Examples of texts, in their order, without those that have no room for a token to learn.

    Args:
      texts: source and target, the target not blank; an empty source leaves BOS alone before the target. A token of the
        target that touches one of its given spans is not learned; its ids are those of the whole target.
      tokenizer: gives the ids; without a BOS of its own the source piece is the source alone.
      lengths: where both together are longer than the model's context, the target is cut.
      train_on_source: the source is learned too (the very first token never is: nothing predicts it).

    Raises:
      InputError: a target has no tokens.
    """
    sources = tokenizer.encode_batch([text.source for text in texts])
    targets = tokenizer.encode_batch([text.target for text in texts])
    given = _given_tokens(texts, targets, tokenizer)
    bos = [] if tokenizer.bos_id is None or tokenizer.ends_source else [tokenizer.bos_id]
    end = [tokenizer.eos_id] if tokenizer.ends_source else []
    for number, text in enumerate(texts):
        sources[number] = _fitting(text, sources[number], tokenizer, lengths.max_source_len - len(bos + end))
    examples = []
    counts = {"sources": 0, "targets": 0, "dropped": 0}
    for number, (text, source, target) in enumerate(zip(texts, sources, targets, strict=True)):
        if not text.target.strip() or not target:
            raise InputError(f"{text.where}: the target is empty: there is nothing to learn")
        whole = bos + source
        first = (whole[: lengths.max_source_len - len(end)] if lengths.max_source_len else whole) + end
        room = max(lengths.target_room(len(first)), 0)
        second = [*target, tokenizer.eos_id][:room]
        loss_mask = np.ones(len(first) + len(second), np.bool_)
        if number in given:
            loss_mask[len(first) : len(first) + len(target)] = ~given[number][:room]
        loss_mask[: 1 if train_on_source else max(len(first), 1)] = False
        if not loss_mask[len(first) :].any():
            counts["dropped"] += 1
            continue
        counts["sources"] += len(first) < len(whole + end)
        counts["targets"] += len(second) <= len(target)
        examples.append(Example(np.asarray(first + second, np.int32), loss_mask, text.where))
    return examples, Truncated(**counts)


def _fitting(text: Text, source: list[int], tokenizer: Tokenizer, room: int) -> list[int]:
    """Ids of the text's source; of the first that fits the room where it has shorter ones, else of the last."""
    if room < 0:
        return source
    for shorter in text.shorter:
        if len(source) <= room:
            break
        source = tokenizer.encode(shorter)
    return source


def _given_tokens(
    texts: Sequence[Text], targets: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> dict[int, np.ndarray]:
    """Of each text that has given spans, by its number: which tokens of its target touch one, bool [tokens]."""
    numbers = [number for number, text in enumerate(texts) if text.given]
    # as a chat's text whose control tokens stand under other names, so that their letters are letters
    encodings = tokenizer.encode_unguarded([(texts[number].target, True) for number in numbers])
    found = {}
    for number, encoding in zip(numbers, encodings, strict=True):
        if encoding.ids != list(targets[number]):
            raise InputError(
                f"{texts[number].where}: the tokenizer does not tell where the tokens of this conversation stand, so "
                "the turns that are not to be learned cannot be masked; take them out, or use a chat template"
            )
        begins, ends = np.asarray(encoding.begins), np.asarray(encoding.ends)
        ends = np.maximum(ends, begins + 1)  # a token without a width stands before a character that is its own too
        touched = np.zeros(len(begins), np.bool_)
        for begin, end in texts[number].given:
            touched |= (begins < end) & (ends > begin)
        found[number] = touched
    return found
