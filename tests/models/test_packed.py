"""Examples packed into one row give what each gives alone: attention, logits, loss and gradients, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax import lora
from qlora_jax.io.load import QuantSpec, load_model
from qlora_jax.lora import LoRAConfig
from qlora_jax.models.attention import causal_attention, chunked_attention, segment_starts
from qlora_jax.train.step import make_evaluation, make_gradient
from tests.llama_names import LINEARS
from tests.random_arrays import random_normal

pytestmark = pytest.mark.quick_compile

FAST = {"xla_backend_optimization_level": 0}
LENGTHS = ((7, 12, 1, 9), (16, 13))  # of the examples in each row
T = 33
IMPLEMENTATIONS = [("xla", 0), ("chunked", 0), ("auto", 8)]  # attention, sequence_chunk


def segments_of(lengths) -> np.ndarray:
    """int32 [B, T]: 1, 2, ... and 0 for padding."""
    rows = np.zeros((len(lengths), T), np.int32)
    for row, parts in zip(rows, lengths, strict=True):
        row[: sum(parts)] = np.repeat(np.arange(1, len(parts) + 1), parts)
    return rows


def pieces(lengths):
    """(row, first place, place after the last) of every example."""
    for row, parts in enumerate(lengths):
        ends = np.cumsum(parts)
        yield from ((row, int(end - n), int(end)) for end, n in zip(ends, parts, strict=True))


def test_where_segments_begin():
    found = segment_starts(jnp.array([[1, 1, 2, 3, 3, 0], [4, 4, 4, 4, 4, 4], [1, 2, 1, 1, 0, 0]]))
    assert found.tolist() == [[0, 0, 2, 3, 3, 5], [0, 0, 0, 0, 0, 0], [0, 1, 2, 2, 4, 4]]


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v, starts: causal_attention(q, k, v, "xla", starts),
        lambda q, k, v, starts: chunked_attention(q, k, v, 8, 5, starts),
        lambda q, k, v, starts: chunked_attention(q, k, v, 7, 64, starts),
    ],
)
def test_attention_stays_within_its_segment(attend):
    q, k, v, d_out = (2 * random_normal(place, (2, T, n, 8)) for place, n in enumerate((4, 2, 2, 4)))
    starts = segment_starts(jnp.asarray(segments_of(LENGTHS)))
    found = with_gradient(lambda q, k, v: attend(q, k, v, starts), q, k, v, d_out)
    segments = jnp.asarray(segments_of(LENGTHS))
    same = segments[:, None, :, None] == segments[:, None, None, :]
    whole = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True)  # noqa: E731
    for mine, theirs in zip(found, with_gradient(whole, q, k, v, d_out), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5, rtol=2e-5)


def with_gradient(attend, q, k, v, d_out):
    """out, dq, dk, dv."""

    def run(*arrays):
        out, pull = jax.vjp(attend, *arrays)
        return out, *pull(d_out)

    return jax.jit(run, compiler_options=FAST)(q, k, v)


def test_keys_before_the_earliest_start_are_not_visited():
    """In a chunk of queries of a late example even a NaN among the early keys changes nothing."""
    q, k, v = (random_normal(n, (1, 32, 2, 8)) for n in range(3))
    starts = segment_starts(jnp.repeat(jnp.array([[1, 2]]), 16, axis=1))
    clean = chunked_attention(q, k, v, 8, 8, starts)
    spoiled = chunked_attention(q, k.at[:, :16].set(jnp.nan), v.at[:, :16].set(jnp.nan), 8, 8, starts)
    assert np.isnan(spoiled[:, :16]).all()
    np.testing.assert_array_equal(spoiled[:, 16:], clean[:, 16:])


def test_cudnn_is_refused():
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="cudnn"):
        causal_attention(x, x, x, "cudnn", jnp.zeros((1, 4), jnp.int32))


def parts(golden, attention, sequence_chunk, remat):
    folder = golden / "llama" / "llama2"
    model = load_model(folder, QuantSpec("none"), jnp.float32, remat, attention, sequence_chunk=sequence_chunk)
    lora.attach(model, LoRAConfig(rank=2, dropout=0.0), jax.random.key(0))
    for place, name in enumerate(LINEARS):
        layer = lora.linear(model, name)
        layer.lora_b.set_value(0.1 * random_normal(place, layer.lora_b.get_value().shape))
    return model


def rows() -> tuple[np.ndarray, np.ndarray]:
    """tokens and loss mask [B, T]; the first token of an example is never a target."""
    rng = np.random.default_rng(1)
    tokens, mask = rng.integers(3, 96, (2, T)).astype(np.int32), rng.random((2, T)) < 0.7
    segments = segments_of(LENGTHS)
    for row, first, _ in pieces(LENGTHS):
        mask[row, first] = False
    return tokens, mask & (segments > 0)


def unpacked() -> tuple[np.ndarray, np.ndarray]:
    """The same examples, one a row, padded to the longest."""
    tokens, mask = rows()
    found = list(pieces(LENGTHS))
    alone = np.zeros((len(found), 16), np.int32), np.zeros((len(found), 16), np.bool_)
    for place, (row, first, end) in enumerate(found):
        alone[0][place, : end - first], alone[1][place, : end - first] = tokens[row, first:end], mask[row, first:end]
    return alone


@pytest.fixture(scope="module")
def alone(golden):
    """Logits [n, 16, V] of the examples one a row, and the gradient's sums and metrics."""
    model = parts(golden, "xla", 0, "block")
    tokens, mask = unpacked()
    logits = logits_of(model, tokens, None)
    graph, adapter, base = lora.split(model)
    gradient = jax.jit(make_gradient(graph, 13, 0.3), compiler_options=FAST)
    return logits, *gradient(adapter, base, tokens[None], mask[None], None)


def logits_of(model, tokens, segments):
    graph, state = nnx.split(model)

    def run(state, tokens, segments):
        model = nnx.merge(graph, state)
        return model.logits(model(tokens, segments=segments)[0])

    return np.asarray(jax.jit(run, compiler_options=FAST)(state, tokens, segments))


@pytest.mark.parametrize(("attention", "sequence_chunk"), IMPLEMENTATIONS)
def test_logits_are_those_of_each_example_alone(golden, alone, attention, sequence_chunk):
    model = parts(golden, attention, sequence_chunk, "none")
    packed = logits_of(model, rows()[0], segments_of(LENGTHS))
    for place, (row, first, end) in enumerate(pieces(LENGTHS)):
        np.testing.assert_allclose(packed[row, first:end], alone[0][place, : end - first], atol=2e-5)


def test_without_segments_an_example_sees_the_one_before(golden, alone):
    straight = logits_of(parts(golden, "xla", 0, "none"), rows()[0], None)
    assert np.abs(straight[0, :7] - alone[0][0, :7]).max() < 2e-5  # the first of a row
    assert np.abs(straight[0, 8] - alone[0][1, 1]).max() > 0.01


@pytest.mark.parametrize(
    ("attention", "sequence_chunk", "remat"), [("xla", 0, "none"), *((*kind, "block") for kind in IMPLEMENTATIONS)]
)
def test_gradients_are_those_of_the_examples_side_by_side(golden, alone, attention, sequence_chunk, remat):
    graph, adapter, base = lora.split(parts(golden, attention, sequence_chunk, remat))
    gradient = jax.jit(make_gradient(graph, 13, 0.3), compiler_options=FAST)
    tokens, mask = rows()
    segments = segments_of(LENGTHS)
    sums, metrics = gradient(adapter, base, tokens[:, None], mask[:, None], None, segments[:, None])  # 2 micro-batches
    _, expected, expected_metrics = alone
    assert float(metrics.target_tokens) == float(expected_metrics.target_tokens) == mask.sum()
    np.testing.assert_allclose(metrics.loss, expected_metrics.loss, rtol=1e-6)
    for mine, theirs in zip(jax.tree.leaves(sums), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * np.abs(theirs).max())


def test_evaluation_of_packed_rows(golden, alone):
    graph, adapter, base = lora.split(parts(golden, "xla", 0, "none"))
    evaluate = jax.jit(make_evaluation(graph, 64), compiler_options=FAST)
    nats, targets = evaluate(adapter, base, *rows(), segments_of(LENGTHS))
    assert targets == alone[2].target_tokens
    np.testing.assert_allclose(nats / targets, alone[2].loss, rtol=1e-6)
