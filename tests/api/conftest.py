"""One small model, finetuned once in Python, for all tests of the front door."""

from pathlib import Path

import pytest

from tests.tiny_checkpoint import write_tiny_checkpoint

WORDS = ("hi", "ho", "hey", "you", "me", "us", "we")
ROWS = [{"instruction": f"Say {word}.", "input": "", "output": f"{word}!"} for word in WORDS]
SETTINGS = {"steps": 4, "rank": 16, "batch_size": 4, "learning_rate": 5e-3}  # the notebook's shapes


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder to work in: runs/ is made there."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", context=192)
