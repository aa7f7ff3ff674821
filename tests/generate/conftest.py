"""A tiny random model with room for 1,024 tokens."""

import pytest

from qlora_jax.io.load import load_model
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model", context=1024)


@pytest.fixture(scope="session")
def tiny_model(tiny_folder):
    return load_model(tiny_folder, compute_dtype="float32")
