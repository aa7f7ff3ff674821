"""Scores of tokens and of options equal those of whole logits, whatever batch and padding they stand in."""

import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.errors import InputError
from qlora_jax.evaluate.scoring import (
    ScoredTokens,
    choose,
    length_batches,
    option_logits_of,
    padded_length,
    token_scores,
)
from qlora_jax.io.load import QuantSpec, load_model

pytestmark = pytest.mark.quick_compile


@pytest.fixture(scope="module")
def model(golden):
    return load_model(golden / "llama" / "llama3", QuantSpec("nf4", 32, True), "float32")


@nnx.jit
def all_logits(model, tokens):
    return model.logits(model(tokens)[0])


def plain(model, tokens: list[int], start: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities float64 and greedy of tokens[start:], from logits computed alone and whole."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    x = np.asarray(all_logits(model, padded), np.float64)[0, start - 1 : len(tokens) - 1]
    logprobs = x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
    return logprobs[np.arange(len(x)), tokens[start:]], x.argmax(-1) == tokens[start:]


def test_token_scores_equal_whole_logits(model):
    rng = np.random.default_rng(0)
    sequences = [ScoredTokens(rng.integers(3, 96, n).tolist(), s) for n, s in ((40, 1), (7, 6), (64, 33), (12, 12))]
    stem = sequences[0].tokens[:20]  # answers of one token each, which are read once, and one that begins earlier
    sequences += [ScoredTokens([*stem, token], 20) for token in (5, 6, 7)] + [ScoredTokens([*stem, 8], 18)]
    seen = []
    found = token_scores(model, sequences, progress=lambda done, total: seen.append((done, total)))
    for sequence, score in zip(sequences, found, strict=True):
        logprobs, greedy = plain(model, list(sequence.tokens), sequence.start)
        np.testing.assert_allclose(score.logprobs, logprobs, atol=2e-5)
        np.testing.assert_array_equal(score.greedy, greedy)
    assert seen[-1] == (8, 8)
    for one, other in zip(found[4:7], token_scores(model, sequences[4:7], batch_size=1), strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)


def test_greedy_is_said_where_the_likeliest_token_stands(model):
    tokens = [5, 9, 11, 30]
    likeliest = int(np.asarray(all_logits(model, np.array([tokens + [0] * 60], np.int32)))[0, 3].argmax())
    other = (likeliest + 1) % 96
    found = token_scores(model, [ScoredTokens([*tokens, likeliest], 4), ScoredTokens([*tokens, other], 4)])
    assert [bool(score.greedy.all()) for score in found] == [True, False]


def test_options_choose_as_transformers_does(golden):
    """Golden logits of transformers, at every position, among four tokens."""
    model = load_model(golden / "llama" / "llama2", compute_dtype="float32")
    file = np.load(golden / "llama" / "llama2" / "logits.npz")
    options = [7, 19, 42, 88]
    places = [(row, t) for row in range(len(file["tokens"])) for t in range(1, file["tokens"].shape[1], 3)]
    prompts = [file["tokens"][row, : t + 1].tolist() for row, t in places]
    found: dict[int, np.ndarray] = {}
    for batch, logits in choose(option_logits_of(model), prompts, options, length_batches([*map(len, prompts)])):
        found |= dict(zip(batch.numbers, logits, strict=True))
    for number, (row, t) in enumerate(places):
        expected = file["logits"][row, t, options]
        np.testing.assert_allclose(found[number], expected, atol=1e-4)
        assert found[number].argmax() == expected.argmax()


@given(st.lists(st.integers(1, 3000), max_size=60), st.one_of(st.none(), st.integers(1, 9)))
def test_batches_hold_every_sequence_once(lengths, batch_size):
    batches = length_batches(lengths, batch_size)
    assert sorted(number for batch in batches for number in batch.numbers) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch.numbers) <= batch.B and batch.T % 64 == 0
        assert all(padded_length(lengths[number]) == batch.T >= lengths[number] for number in batch.numbers)
    assert [batch.T for batch in batches] == sorted((batch.T for batch in batches), reverse=True)


def test_few_lengths():
    assert len({padded_length(n) for n in range(1, 2049)}) == 10
    assert all(padded_length(n) < max(2 * n, 65) for n in range(1, 2049))


def test_broken_weights_and_batch_sizes(model):
    with pytest.raises(InputError, match="batch_size is 0"):
        length_batches([3], 0)
    graph, state = nnx.split(model)
    broken = nnx.merge(graph, state)
    broken.norm.weight[...] = broken.norm.weight.get_value() * np.nan
    with pytest.raises(InputError, match="weights or adapter are broken"):
        token_scores(broken, [ScoredTokens([1, 2, 3], 1)])
