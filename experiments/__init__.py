"""The commands: `python -m experiments.NAME`. Flags and calls, no maths."""

import os

# Before any command imports jax: its C++ parts write log lines to stderr from their first call on.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# JAX's allocator takes 0.75 of a GPU by default; plans are made for this (qlora_jax.train.memory.MEMORY_FRACTION)
if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
