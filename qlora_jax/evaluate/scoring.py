"""What a model says of given tokens: their log-probabilities, or its choice among a few answers.

Perplexity, MMLU and the lm-eval adapter stand on these two programs. Sequences are batched by length, longest first,
and padded to few lengths, so few programs are compiled. Logits exist for `LOGITS_CHUNK` positions at a time, and
only for positions that predict a token that is asked for; among options, only the options' rows of the head are
multiplied at all.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from qlora_jax import lora
from qlora_jax.errors import InputError
from qlora_jax.mesh.axes import ROWS
from qlora_jax.mesh.place import Devices, on_mesh
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.divided.part import own_part
from qlora_jax.models.head import head_logits

BATCH_TOKENS = 8192  # of a batch, padding included, where no batch size is given
LOGITS_CHUNK = 1024  # positions whose logits exist at a time
PAD_TO = 64  # tokens
SPANS = 4  # positions of a row that are scored are padded to so many, or twice that, and so on


@dataclasses.dataclass(frozen=True)
class ScoredTokens:
    """Token ids, of which those from `start` on (at least 1) are scored, given all before them."""

    tokens: Sequence[int] | np.ndarray
    start: int


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """Of the scored tokens of a sequence: log-probabilities float32 [t], nats, and whether each was the likeliest."""

    logprobs: np.ndarray
    greedy: np.ndarray


@dataclasses.dataclass(frozen=True)
class Batch:
    """Places in the caller's list, and the length and number of rows they are padded to."""

    numbers: list[int]
    T: int
    B: int


def padded_length(length: int) -> int:
    """The next of 64 * (1, 2, 3, 4, 6, 8, 12, 16, ...): ten lengths up to 2,048, at most half of one padding."""
    step = PAD_TO
    while 2 * step < length:
        step *= 2
    return step if length <= step else next(n for n in (3 * step // 2, 2 * step) if n % PAD_TO == 0 and n >= length)


def length_batches(lengths: Sequence[int], batch_size: int | None = None) -> list[Batch]:
    """Batches of one padded length each, longest first.

    Args:
      lengths: tokens of each sequence.
      batch_size: rows of a batch; as many as make 8,192 tokens if None. The last batch of a length is filled up.
    Raises:
      InputError: batch_size is less than 1.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected at least 1")
    groups: dict[int, list[int]] = {}
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        groups.setdefault(padded_length(lengths[number]), []).append(number)
    batches = []
    for T, numbers in groups.items():
        B = min(batch_size or max(1, BATCH_TOKENS // T), len(numbers))
        batches += [Batch(numbers[start : start + B], T, B) for start in range(0, len(numbers), B)]
    return batches


def token_scores(
    model: Decoder,
    sequences: Sequence[ScoredTokens],
    batch_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TokenScores]:
    """Scores of every sequence's tokens from its start on; any adapter on the model counts, without dropout.

    A sequence may have one token more than the model's context: the last one is scored and never read. Sequences that
    differ in it alone, as the answers of a multiple choice often do, are read once.
    `progress` is called with (sequences done, sequences in all).

    Raises:
      InputError: batch_size is less than 1, or a log-probability is not finite.
    """
    if model.config.kind.pair is not None:
        raise InputError(
            "texts are scored by a decoder, and this model is an encoder-decoder (T5): its answers are measured by "
            "evaluate --task=rouge, its loss by --task=heldout"
        )
    longest = max((len(sequence.tokens) - 1 for sequence in sequences), default=0)
    if model.config.kind.positions and longest > model.config.context:
        raise InputError(
            f"{longest} tokens are to be read, but the model has {model.config.context} learned positions: ask for a "
            "context of at most so many"
        )
    graph, adapter, base = lora.split(model)
    found: dict[int, TokenScores] = {}
    rows: dict[bytes, list[int]] = {}  # what is read -> sequences that differ in their last token or their start alone
    for number, sequence in enumerate(sequences):
        rows.setdefault(np.asarray(sequence.tokens[:-1], np.int32).tobytes(), []).append(number)
    shared = list(rows.values())
    lengths = [max(len(sequences[numbers[0]].tokens) - 1, 1) for numbers in shared]
    for batch in length_batches(lengths, batch_size):
        members = [[sequences[number] for number in shared[row]] for row in batch.numbers]
        W = _padded_span(max(sum(len(s.tokens) - s.start for s in row) for row in members))
        tokens = np.zeros((batch.B, batch.T), np.int32)
        places, labels = np.zeros((batch.B, W), np.int32), np.zeros((batch.B, W), np.int32)
        for row, (first, *_) in enumerate(members):
            tokens[row, : len(first.tokens) - 1] = first.tokens[:-1]
            asked = np.concatenate([np.arange(s.start, len(s.tokens)) for s in members[row]])
            places[row, : len(asked)] = asked - 1
            labels[row, : len(asked)] = np.concatenate([s.tokens[s.start :] for s in members[row]])
        logprobs, greedy = map(np.asarray, _token_scores(graph, adapter, base, tokens, places, labels))
        for row, numbers in enumerate(shared[number] for number in batch.numbers):
            end = 0
            for number in numbers:
                begin, end = end, end + len(sequences[number].tokens) - sequences[number].start
                found[number] = TokenScores(logprobs[row, begin:end], greedy[row, begin:end])
                if not np.isfinite(found[number].logprobs).all():
                    raise InputError(
                        f"sequence {number + 1} has no finite likelihood: the model's weights or adapter are broken"
                    )
        progress(len(found), len(sequences))
    return [found[number] for number in range(len(sequences))]


def _padded_span(span: int) -> int:
    W = SPANS
    while span > W:
        W *= 2
    return W


@partial(jax.jit, static_argnames="graph")
def _token_scores(
    graph: Any, adapter: Any, base: Any, tokens: jax.Array, places: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """tokens int32 [B, T]; places and labels int32 [B, W] -> log-probabilities float32 [B, W], greedy bool [B, W]."""
    model = nnx.merge(graph, adapter, base)
    # of each row without its padding, its last token counted that is scored and never read
    hidden, _ = model(tokens, lengths=jnp.max(places, axis=1) + 2)
    rows = jnp.take_along_axis(hidden, places[..., None], axis=1).reshape(-1, hidden.shape[-1])
    count = rows.shape[0]
    chunk = min(LOGITS_CHUNK, count)
    rows = jnp.pad(rows, ((0, -count % chunk), (0, 0))).reshape(-1, chunk, rows.shape[-1])
    wanted = jnp.pad(labels.reshape(-1), (0, -count % chunk)).reshape(-1, chunk)
    head = model.head_weight()

    def score(_, inputs):
        rows, wanted = inputs
        logits = head_logits(rows, head)
        picked = jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        return None, (picked - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == wanted)

    _, (logprobs, greedy) = jax.lax.scan(score, None, (rows, wanted))
    return logprobs.reshape(-1)[:count].reshape(labels.shape), greedy.reshape(-1)[:count].reshape(labels.shape)


def make_option_logits(graph: Any, devices: Devices | None = None) -> Callable[..., jax.Array]:
    """The function to jit: option_logits(adapter, base, tokens int32 [B, T], last int32 [B], options int32 [n]) ->
    float32 [B, n], the logits of the options as the token after position `last`, without dropout. `devices` divide B
    among them, or the tokens of each row."""

    def option_logits(adapter, base, tokens, last, options):
        model = own_part(nnx.merge(graph, adapter, base))
        B = tokens.shape[0]
        if devices is not None:
            last = jax.lax.dynamic_slice_in_dim(last, devices.shards.first_row(B), B)
        hidden, _ = model(tokens, lengths=last + 1)
        return head_logits(model.at_places(hidden, last), model.head_weight()[options])

    return option_logits if devices is None else on_mesh(option_logits, devices, lambda adapter: PartitionSpec(ROWS))


def option_logits_of(model: Decoder) -> Callable[..., jax.Array]:
    """option_logits(tokens, last, options) of a model, compiled once a shape."""
    graph, adapter, base = lora.split(model)
    return lambda *arguments: _option_logits(graph, adapter, base, *arguments)


@partial(jax.jit, static_argnames="graph")
def _option_logits(graph: Any, *arguments: Any) -> jax.Array:
    return make_option_logits(graph)(*arguments)


def choose(
    option_logits: Callable[..., jax.Array],
    prompts: Sequence[Sequence[int]],
    options: Sequence[int],
    batches: Sequence[Batch],
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Each batch with float32 [rows, n]: the options' logits as the token after each of its prompts."""
    for batch in batches:
        tokens, last = np.zeros((batch.B, batch.T), np.int32), np.zeros(batch.B, np.int32)
        for row, number in enumerate(batch.numbers):
            tokens[row, : len(prompts[number])], last[row] = prompts[number], len(prompts[number]) - 1
        logits = np.asarray(option_logits(tokens, last, np.asarray(options, np.int32)))
        yield batch, logits[: len(batch.numbers)]
