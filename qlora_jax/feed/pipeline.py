"""Batches ahead of the steps that take them, by grain: read and padded in a thread while the device computes.

A batch is a pure function of the step (feed/batches.py), so the data set is one that is read by index, and its state is
the number of the next step: a checkpoint's step number is the position in the data too. Nothing is lost or repeated
however much was read ahead when a run ended.
"""

from typing import Any, Protocol

import numpy as np

from qlora_jax.feed.batches import Shard

AHEAD = 4  # batches that are ready, or being made, before they are asked for


class StepBatches(Protocol):
    """What Batches, PackedBatches and FileBatches have in common."""

    @property
    def batch_size(self) -> int: ...

    def batch(self, step: int, shard: Shard) -> dict[str, np.ndarray]: ...


class _Steps:
    """A source for grain: element s is the batch of step s."""

    def __init__(self, batches: StepBatches, steps: int, shard: Shard):
        self._batches, self._steps, self._shard = batches, steps, shard

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: Any) -> dict[str, np.ndarray]:
        return self._batches.batch(int(step), self._shard)


def step_dataset(
    batches: StepBatches, steps: int, shard_index: int | None = None, shard_count: int | None = None
) -> Any:
    """A grain.MapDataset whose element s is this host's part of the batch of step s.

    Args:
      batches: of all hosts together.
      steps: its length.
      shard_index, shard_count: which host of how many; None: jax.process_index() and jax.process_count().

    Raises:
      InputError: the batches cannot be divided among so many.
    """
    import grain
    import jax

    shard = Shard(
        jax.process_index() if shard_index is None else shard_index,
        jax.process_count() if shard_count is None else shard_count,
    )
    shard.rows(batches.batch_size)
    return grain.MapDataset.source(_Steps(batches, steps, shard))


def prefetched(dataset: Any, start: int) -> Any:
    """A grain.DatasetIterator over the steps from `start` to the last, AHEAD of them made in a thread; close() it.

    Its get_state() and set_state() are the number of the next step.
    """
    import grain

    # one thread: numpy's copying holds the interpreter's lock, and a second would only take turns
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)))
    iterator.set_state({"next_index": start})
    return iterator
