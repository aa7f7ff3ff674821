"""The commands: `qlora NAME`, or `python -m experiments.NAME`. Flags and calls, no maths."""

import qlora_jax  # noqa: F401  (sets what JAX reads when it is first imported, before any command imports JAX)
