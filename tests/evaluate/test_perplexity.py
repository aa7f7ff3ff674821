"""Perplexity equals that of the golden logits, counted in numpy; windows cover every token once."""

import math

import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.errors import InputError
from qlora_jax.evaluate.perplexity import perplexity, read_tokens, windows
from qlora_jax.io.load import QuantSpec, load_model

pytestmark = pytest.mark.quick_compile

BOS = 1


def nats(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """float32 [T, V], int32 [T] -> float64 [T - 1]: -log p of tokens[1:]."""
    x = logits[:-1].astype(np.float64)
    log_sum = np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1)
    return log_sum - x[np.arange(len(x)), tokens[1:]]


@nnx.jit
def all_logits(model, tokens):
    return model.logits(model(tokens)[0])


def test_equals_the_golden_logits(golden) -> None:
    # transformers' logits begin with whatever token stands first: it takes the part of BOS
    file = np.load(golden / "llama" / "llama2" / "logits.npz")
    model = load_model(golden / "llama" / "llama2", compute_dtype="float32")
    for logits, tokens in zip(file["logits"], file["tokens"], strict=True):
        first = int(tokens[0])
        scored = tokens[1:] != first
        expected = nats(logits, tokens)[scored]
        found = perplexity(model, [tokens], first)
        assert found.tokens == scored.sum() and found.windows == 1
        assert found.nll_per_token == pytest.approx(expected.mean(), abs=1e-5)
        assert found.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-5)


def test_windows_and_batches_are_summed(golden) -> None:
    model = load_model(golden / "llama" / "llama3", QuantSpec("int4", 32, False), "float32")
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 96, length) for length in (150, 1, 63, 64, 5)]
    total, count = 0.0, 0
    for text in texts:
        for start in range(0, len(text), 63):
            window = np.concatenate([[BOS], text[start : start + 63]]).astype(np.int32)
            padded = np.zeros((1, 64), np.int32)
            padded[0, : len(window)] = window
            logits = np.asarray(all_logits(model, padded))[0, : len(window)]
            total, count = total + nats(logits, window).sum(), count + len(window) - 1
    for batch_size in (None, 3):
        found = perplexity(model, texts, BOS, batch_size=batch_size)
        assert found.tokens == count == 283 and found.windows == 8
        assert found.nll_per_token == pytest.approx(total / count, abs=1e-5)


@given(st.lists(st.lists(st.integers(2, 50), max_size=30), max_size=4), st.integers(2, 12))
def test_windows_hold_every_token_once_after_bos(texts, context) -> None:
    cut = windows(texts, context, BOS)
    assert all(piece[0] == BOS and 2 <= len(piece) <= context and piece.dtype == np.int32 for piece in cut)
    assert [token for piece in cut for token in piece[1:].tolist()] == [token for text in texts for token in text]
    assert len(cut) == sum(math.ceil(len(text) / (context - 1)) for text in texts)


def test_windows_without_bos_and_with_one_already_there() -> None:
    assert [piece.tolist() for piece in windows([[5, 6, 7, 8, 9]], 2, None)] == [[5, 6], [7, 8]]
    assert [piece.tolist() for piece in windows([[BOS, 5, 6, 7]], 4, BOS)] == [[BOS, 5, 6, 7]]


def test_bos_inside_a_text_is_not_scored(golden) -> None:
    model = load_model(golden / "llama" / "llama2", compute_dtype="float32")
    assert perplexity(model, [[5, 6, BOS, 7]], BOS).tokens == 3


@pytest.mark.parametrize(
    ("texts", "settings", "named"),
    [
        ([[]], {}, "no token to score"),
        ([[BOS, BOS]], {}, "no token to score but BOS"),
        ([[5]], {"context": 1}, "context is 1"),
        ([[5]], {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_nothing_to_score_is_said(golden, texts, settings, named) -> None:
    model = load_model(golden / "llama" / "llama2", compute_dtype="float32")
    with pytest.raises(InputError, match=named):
        perplexity(model, texts, BOS, **settings)


def test_token_files(tmp_path) -> None:
    file = tmp_path / "tokens.npy"
    for array, expected in (
        (np.arange(4, dtype=np.uint16), [[0, 1, 2, 3]]),
        (np.arange(4, dtype=np.int64).reshape(2, 2), [[0, 1], [2, 3]]),
    ):
        np.save(file, array)
        assert [text.tolist() for text in read_tokens(file, 4)] == expected
    for bad, named in (
        (np.array([1, 2, 4]), r"token id 4 at \[2\]; the model's vocabulary is 0 to 3"),
        (np.array([[1, 2], [-1, 0]]), r"token id -1 at \[1, 0\]"),
        (np.array([1.0, 2.0]), r"float64 \[2\]; expected integer"),
        (np.zeros((0,), np.int32), r"int32 \[0\]; expected integer"),
        (np.zeros((1, 1, 1), np.int32), "expected integer"),
    ):
        np.save(file, bad)
        with pytest.raises(InputError, match=named):
            read_tokens(file, 4)
    file.write_text("no array")
    with pytest.raises(InputError, match="cannot be read as an .npy array"):
        read_tokens(file, 4)
    with pytest.raises(InputError, match="cannot be read"):
        read_tokens(tmp_path / "absent.npy", 4)


def test_a_likelihood_beyond_all_floats_is_an_error(golden) -> None:
    model = load_model(golden / "llama" / "llama2", compute_dtype="float32")
    model.norm.weight.set_value(model.norm.weight.get_value() * 1e5)
    with pytest.raises(InputError, match=r"nats a token: the model's weights or adapter are broken"):
        perplexity(model, [np.arange(1, 20)], BOS)
