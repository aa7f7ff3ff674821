"""A run small enough to be repeated: the golden llama1 checkpoint on six ready batches."""

from pathlib import Path
from typing import Any

import numpy as np

from configs import base


def tiny_config(golden: Path, folder: Path) -> Any:
    """Config of 6 steps of 4 sequences of 12 tokens, whose batches are in `folder`."""
    batches = np.random.default_rng(0).integers(3, 96, (6, 4, 12)).astype(np.int32)
    np.save(folder / "batches.npy", batches)
    c = base.get_config()
    c.model.path = str(golden / "llama" / "llama1")
    c.model.compute_dtype = "float32"
    c.lora.rank = 2
    c.lora.targets = ("q_proj", "down_proj")  # the gradient compiles in two thirds of the time of all seven
    c.data.batches = str(folder / "batches.npy")
    c.optimizer.learning_rate = 1e-2
    c.train.steps = 6
    c.train.batch_size = 4
    c.train.grad_accum = 2
    c.train.checkpoint_every = 2
    return c
