"""What the plan's tests share."""

import pytest

from qlora_jax.planning import topology


@pytest.fixture(scope="session")
def xla_gpu() -> None:
    """Skips where XLA:GPU's compiler is not installed."""
    if not topology.is_installed():
        pytest.skip("needs XLA:GPU's compiler: pip install jax-cuda13-plugin")
