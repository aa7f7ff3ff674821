"""How much of a run's batches is padding."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qlora_jax.data.examples import Example
from qlora_jax.errors import InputError
from qlora_jax.feed.batches import Batches
from qlora_jax.feed.orders import Shares
from qlora_jax.feed.packing import PackedBatches, pack_length
from qlora_jax.feed.store import lengths_of


@dataclasses.dataclass(frozen=True)
class Padding:
    """Of the first epoch's batches: tokens that are examples, tokens with padding, and the steps of every length T."""

    tokens: int
    padded: int
    steps_by_length: dict[int, int]
    rows: int = 0  # packed rows of an epoch; 0 where a row is one example

    @property
    def waste(self) -> float:
        """The part of all positions that is padding, 0 to 1."""
        return 1 - self.tokens / self.padded

    @property
    def steps(self) -> int:
        return sum(self.steps_by_length.values())

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"waste": self.waste, "steps": self.steps}


def padding(batches: Batches | PackedBatches) -> Padding:
    """Counts the first epoch without making its batches."""
    tokens, lengths = batches.padded(batches.steps_per_epoch)
    found, steps = np.unique(lengths, return_counts=True)
    by_length = dict(zip(found.tolist(), steps.tolist(), strict=True))
    rows = batches.plan.rows if isinstance(batches, PackedBatches) else 0
    return Padding(tokens, int(lengths.sum()) * batches.batch_size, by_length, rows)


def padding_by_method(
    data: Any, examples: Sequence[Example], batch_size: int, shares: Shares | None = None
) -> dict[str, Padding]:
    """The same examples shuffled, grouped by length and packed; `data` is the config's section, `shares` are those of
    several data sets.

    Packed is left out where it cannot be: an example is longer than the rows (data.pack_length), or a share of few rows
    is none.
    """
    rest = (data.pad_to_multiple_of, 0, data.seed, shares)
    found = {
        "shuffled": padding(Batches(examples, batch_size, False, *rest)),
        "grouped by length": padding(Batches(examples, batch_size, True, *rest)),
    }
    longest = int(lengths_of(examples).max())
    T = pack_length(data, longest)
    with contextlib.suppress(InputError):
        found[f"packed to {T}"] = padding(PackedBatches(examples, batch_size, T, 0, data.seed, shares))
    return found


def padding_line(batches: Batches | PackedBatches) -> str:
    """How much of the first epoch's batches is padding, for the user."""
    waste = padding(batches)
    packed = ""
    if waste.rows:
        packed = f"{waste.rows:,} packed rows of {len(batches.examples) / waste.rows:.1f} examples; "
    lengths = ", ".join(map(str, waste.steps_by_length))
    return (
        f"{packed}padding: {waste.waste:.1%} of the first epoch's {waste.padded:,} positions; batches are {lengths} "
        "tokens long"
    )
