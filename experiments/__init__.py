"""The commands: `python -m experiments.NAME`. Flags and calls, no maths."""

import os

# Before any command imports jax: its C++ parts write log lines to stderr from their first call on.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
