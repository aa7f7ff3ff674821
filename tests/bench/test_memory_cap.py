"""Sizes as text, and what the cap makes of them."""

import pytest

from qlora_jax.bench import memory_cap
from qlora_jax.errors import InputError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("48GiB", 48 * 2**30),
        ("48GB", 48 * 10**9),
        ("48 gib", 48 * 2**30),
        ("0.5GiB", 2**29),
        ("512MiB", 2**29),
        ("1.5tb", 15 * 10**11),
    ],
)
def test_sizes(text, size):
    assert memory_cap.parse_bytes(text, "--f") == size


@pytest.mark.parametrize("text", ["", "48", "48G", "GiB", "-1GiB", "0GiB", "1e3GiB", "48GiBB"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match=f"^--f={text}: expected a size with its unit"):
        memory_cap.parse_bytes(text, "--f")


def test_a_cap_becomes_the_fraction_of_the_card(monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.95")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    memory_cap.set_cap(48 * 2**30, 80 * 2**30, "--f")
    assert float(memory_cap.os.environ["XLA_CLIENT_MEM_FRACTION"]) == pytest.approx(0.6)
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in memory_cap.os.environ
    with pytest.raises(InputError, match="--f: this GPU has 24.00 GiB .25.77 GB.: give at most that"):
        memory_cap.set_cap(48 * 2**30, 24 * 2**30, "--f")


@pytest.mark.parametrize(
    ("limit", "found"),
    [(None, "states no limit"), (72 * 2**30, "gives out 72.00 GiB")],
)
def test_a_cap_that_jax_does_not_keep_to_is_an_error(limit, found):
    memory_cap.check_cap(48 * 2**30, 48 * 2**30 + 4096, "--f")
    with pytest.raises(InputError, match=f"--f: JAX's allocator {found}"):
        memory_cap.check_cap(48 * 2**30, limit, "--f")


def test_no_gpu_is_asked_for_on_cpus(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert memory_cap.gpu_memory_bytes() is None
