"""Decoding with a KV cache: prompts in, tokens out, a chunk of steps to a device call.

Prompts are right-padded to a multiple of 64 and read into the cache in pieces of at most 256 tokens, so few programs
are compiled and the scores of a long prompt never stand in memory at once. On a GPU, where small pieces leave most of
it idle, prompts that are new are read in one piece, with attention as in training. Decoding is one `lax.while_loop` a
chunk, sampling included; it ends early when every row is done. What a padded position leaves in the cache is
overwritten before any query can see it (a key is seen from its own position on): prompts of different lengths share a
batch without left padding, and every position is the one of training. Model arrays are arguments of the programs, and
programs are kept between calls.

A row's scores do not depend on what its neighbours hold. Between batches of different sizes they differ by rounding,
since a matmul of other shape may sum in another order; rows are therefore filled up to a multiple of 8 where that
stays within the batch size, and on a CPU in float32 such batches have equal bits.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.finite import largest_magnitude
from pallas_kernels.nf4_matmul import is_for_cpu
from qlora_jax.errors import InputError
from qlora_jax.generate.pairs import begin
from qlora_jax.generate.sampling import Sampling, next_tokens
from qlora_jax.generate.seeds import Draws, draws_of_all, row_keys
from qlora_jax.models.block import Cache
from qlora_jax.models.decoder import Decoder

PAD_TO = 64  # tokens; prompt lengths and cache sizes are multiples of it
PREFILL = 256  # tokens of each prompt read at a time
WHOLE = 2**13  # tokens of all prompts that a GPU reads in one piece: enough to fill it
CHUNK = 16  # decoding steps of a device call when nobody watches; a stop is seen after it
_BROKEN = -2  # stands where a token would, had the logits been finite
_NO_TOKEN = -1
WIDTH = 16  # tokens that a program has room for, or a multiple: calls of other numbers of steps share it
ENDS = 4  # end tokens that a program has room for, or a multiple
ROWS = 8  # a batch has a multiple of so many rows where its size allows
# To XLA:GPU: all kernels of a token are one CUDA graph, where by itself it makes one of every layer. The loop over
# layers is unrolled in it, since kernels take slices of stacked weights by their addresses; CUB's sort has no place in
# a graph. Needs a driver for CUDA 12.9 or later.
GRAPHS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE",
    "xla_gpu_command_buffer_unroll_loops": True,
    "xla_gpu_graph_min_graph_size": 1,
    "xla_gpu_enable_cub_radix_sort": False,
}


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a prompt led to.

    tokens: new ids, without the end token.
    reason: why it ended: "eos", "length" (max_new_tokens), "context" (the model's is full) or "stop" (a sign of the
      caller's own).
    """

    tokens: list[int]
    reason: str


class Rows(NamedTuple):
    """The device's side of a batch in generation."""

    cache: Cache
    hidden: jax.Array  # [B, D] of each row's last token
    lengths: jax.Array  # int32 [B], tokens of the row in the cache
    counts: jax.Array  # int32 [B], tokens drawn
    done: jax.Array  # bool [B]


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.9,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
    batch_size: int = 16,
) -> list[list[int]]:
    """New tokens of each prompt, end token left out. Arguments and errors as `complete` and `Sampling`."""
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    return [done.tokens for done in complete(model, prompts, sampling, eos_ids, batch_size)]


def never(number: int, tokens: Sequence[int]) -> bool:
    """The stop of whoever has none."""
    return False


def complete(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_ids: Sequence[int],
    batch_size: int = 16,
    stop: Callable[[int, Sequence[int]], bool] = never,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Completion]:
    """Continues every prompt, longest first. Arguments and errors as `complete_batches`."""
    longest_first = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    batches = complete_batches(model, prompts, sampling, eos_ids, batch_size, stop, progress, order=longest_first)
    finished = {number: end for numbers, ends in batches for number, end in zip(numbers, ends, strict=True)}
    return [finished[number] for number in range(len(prompts))]


def complete_batches(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_ids: Sequence[int],
    batch_size: int = 16,
    stop: Callable[[int, Sequence[int]], bool] = never,
    progress: Callable[[int, int], None] = lambda done, total: None,
    draws: Sequence[Draws] | None = None,
    order: Sequence[int] | None = None,
) -> Iterator[tuple[list[int], list[Completion]]]:
    """Continues prompts batch by batch: yields places in `prompts` and what they led to, as each batch ends.

    Args:
      model: on its device; any adapter on it is used, without dropout.
      prompts: token ids, BOS included where the model wants it; at least one token each.
      sampling: see Sampling.
      eos_ids: ids that end an answer.
      batch_size: prompts decoded together.
      stop: asked every few steps with (place in `prompts`, new tokens) of a row that was not done before them; True
        ends it, with the reason "stop" whatever else came after.
      progress: called with (prompts done, of how many).
      draws: of each prompt; by default from its ids and the seed (generate/seeds.py).
      order: the places to continue, in this order; all by default. Programs and shapes do not depend on it, so the rest
        of a list is continued as it would have been with the whole.
    Raises:
      InputError: a prompt is empty, has an id outside the vocabulary, or leaves no room in the model's context; or
        logits are not finite.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected at least 1")
    for number, prompt in enumerate(prompts):
        check_prompt(prompt, model, f"prompt {number + 1}")
    if not prompts:
        return
    draws = draws_of_all(prompts, sampling.seed) if draws is None else draws
    order = range(len(prompts)) if order is None else order
    room = room_for(model, max(map(len, prompts)), sampling.max_new_tokens)
    rows = min(batch_size, -(-len(prompts) // ROWS) * ROWS)  # of every batch, also the last: one program
    if len(prompts) == 1:
        rows = 1
    for start in range(0, len(order), rows):
        numbers = list(order[start : start + rows])
        batch = Decoding(
            model,
            [prompts[number] for number in numbers],
            sampling,
            eos_ids,
            [draws[number] for number in numbers],
            room,
            fill=rows - len(numbers),
        )
        while not batch.done:
            running = batch.unfinished()
            batch.step(CHUNK)
            for row in running:
                if stop(numbers[row], batch.tokens[row]):
                    batch.finish(row, "stop")
            progress(start + len(numbers) - len(batch.unfinished()), len(order))
        yield numbers, [Completion(*end) for end in batch.ends()]


def check_prompt(prompt: Sequence[int], model: Decoder, name: str) -> None:
    """Raises InputError unless the prompt has tokens, all of the vocabulary, and leaves room for one more."""
    V, context = model.config.V, model.config.context
    if not prompt:
        raise InputError(f"{name} has no token; expected at least one (BOS for a model that has it)")
    outside = next((token for token in prompt if not 0 <= token < V), None)
    if outside is not None:
        raise InputError(f"{name} has token id {outside}; the model knows 0 to {V - 1} (is it its tokenizer?)")
    if len(prompt) >= context and model.config.kind.pair is None:
        raise InputError(
            f"{name} has {len(prompt)} tokens; the model's context of {context} leaves no room for an answer"
        )


def room_for(model: Decoder, length: int, max_new_tokens: int) -> int:
    """Cache positions that a prompt of this length and its answer need, padded. Of an encoder-decoder its answer alone,
    behind the start token: distances know no end."""
    if model.config.kind.pair is not None:
        return _padded(1 + max_new_tokens)
    return _padded(min(length + max_new_tokens, model.config.context))


class Decoding:
    """A batch of prompts on their way: read on construction, continued by `step`.

    Args:
      draws: of each row (generate/seeds.py).
      room: cache positions S, at least `room_for` every prompt.
      fill: rows to add that count as done, so that a smaller batch can use a larger one's program.
      earlier: a decoding of one row whose cache is taken over, so that what its row and the one prompt have in common
        is not read again. It cannot be used afterwards.
      graphs: decode with GRAPHS, on a GPU; no GPU has run that yet.
    Attributes:
      tokens: new tokens of each row so far, end token left out.
      steps: passes through the model since the prompts were read, one a token of the longest answer.
    Prompts are taken to be checked (`check_prompt`).
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        eos_ids: Sequence[int],
        draws: Sequence[Draws],
        room: int,
        fill: int = 0,
        earlier: "Decoding | None" = None,
        graphs: bool = False,
    ):
        self._program = _decode_in_graphs if graphs else _decode
        self._graph, self._state = _in_compute_dtype(model)
        self._sampling, self._eos_ids = sampling, frozenset(eos_ids)
        self._prompts = [list(prompt) for prompt in prompts]
        self._rows: Rows
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.steps = 0
        self._reasons: list[str | None] = [None] * len(prompts)
        self._limits = [min(sampling.max_new_tokens, model.config.context - len(prompt)) for prompt in prompts]
        B = len(prompts) + fill
        start, cache = 0, None
        is_pair = model.config.kind.pair is not None
        if is_pair:
            self._limits = [sampling.max_new_tokens] * len(prompts)
        if earlier is not None and not is_pair and model.turns_alike(earlier._rows.cache.k.shape[2], room):
            start, cache = earlier._hand_over(self._prompts[0])
        lengths = np.asarray([*map(len, prompts), *[1] * fill], np.int32)
        padded = np.zeros((B, _padded(int(lengths.max()) - start)), np.int32)
        for row, prompt in enumerate(self._prompts):
            padded[row, : len(prompt) - start] = prompt[start:]
        if is_pair:
            cache, hidden, lengths = begin(self._graph, self._state, padded, lengths, room)
        else:
            cache = model.new_cache(B, room) if cache is None else _grown(cache, room)
            hidden = jax.device_put(np.zeros((B, model.config.head_width), model.compute_dtype))
        is_whole = not (is_pair or start or is_for_cpu()) and _whole(padded.shape[1], room) * B <= WHOLE
        if is_whole:
            padded = np.pad(padded, ((0, 0), (0, _whole(padded.shape[1], room) - padded.shape[1])))
            cache, hidden = _read_whole(self._graph, self._state, cache, padded, lengths)
        for offset in range(0, 0 if is_pair or is_whole else padded.shape[1], PREFILL):
            piece = padded[:, offset : offset + PREFILL]
            cache, hidden = _read(self._graph, self._state, cache, hidden, piece, np.int32(start + offset), lengths)
        done = np.arange(B) >= len(prompts)
        self._rows = Rows(cache, hidden, *jax.device_put((lengths, np.zeros(B, np.int32), done)))
        ends = np.full(max(1, -(-len(self._eos_ids) // ENDS)) * ENDS, _NO_TOKEN, np.int32)
        ends[: len(self._eos_ids)] = sorted(self._eos_ids)
        settings = Settings(
            limits=np.asarray([*self._limits, *[0] * fill], np.int32),
            keys=row_keys(draws, fill),
            eos_ids=ends,
            temperature=np.float32(sampling.temperature),
            top_p=np.float32(sampling.top_p),
            top_k=np.int32(sampling.top_k),
            min_p=np.float32(sampling.min_p),
        )
        self._settings = jax.device_put(settings)  # a transfer each, where jnp would compile programs

    def step(self, steps: int) -> list[list[int]]:
        """Decodes up to `steps` tokens a row and returns the new ones, [] for rows that are done.

        Raises InputError where a row's logits are not finite: no token follows from them.
        """
        width = -(-steps // WIDTH) * WIDTH
        self._rows, drawn, taken = self._program(self._graph, self._state, self._rows, self._settings, steps, width)
        try:
            self.steps += int(taken)
        except KeyboardInterrupt:
            # the device goes on with its steps; a process that ended under them would be aborted
            jax.block_until_ready(self._rows)
            raise
        new: list[list[int]] = []
        for row, ids in enumerate(np.asarray(drawn)[: len(self.tokens)].tolist()):
            if _BROKEN in ids:
                place = len(self._prompts[row]) + len(self.tokens[row]) + ids.index(_BROKEN)
                raise InputError(
                    f"the logits after {place:,} tokens (prompt {row + 1} of its batch) hold NaN or inf: the model's "
                    "weights or adapter are broken"
                )
            ids = [token for token in ids if token >= 0]
            if ids and ids[-1] in self._eos_ids:
                self._reasons[row] = "eos"
                ids.pop()
            self.tokens[row] += ids
            if self._reasons[row] is None and len(self.tokens[row]) >= self._limits[row]:
                self._reasons[row] = "length" if self._limits[row] == self._sampling.max_new_tokens else "context"
            new.append(ids)
        return new

    def finish(self, row: int, reason: str) -> None:
        """Ends a row."""
        self._reasons[row] = reason
        done = np.array(self._rows.done)
        done[row] = True
        self._rows = self._rows._replace(done=jax.device_put(done))

    def unfinished(self) -> list[int]:
        return [row for row, reason in enumerate(self._reasons) if reason is None]

    @property
    def done(self) -> bool:
        return not self.unfinished()

    def ends(self) -> list[tuple[list[int], str]]:
        """(new tokens, reason) of each row; all are done."""
        return [(tokens, reason or "") for tokens, reason in zip(self.tokens, self._reasons, strict=True)]

    def _hand_over(self, prompt: list[int]) -> tuple[int, Cache]:
        """How many tokens of the prompt the cache already has (the last is always read again), and the cache."""
        known = self._prompts[0] + self.tokens[0]
        same = next((i for i, pair in enumerate(zip(known, prompt, strict=False)) if pair[0] != pair[1]), len(known))
        return min(same, len(prompt) - 1), self._rows.cache


class Settings(NamedTuple):
    """What stays the same while a batch is decoded: arrays, on the device once decoding begins."""

    limits: Any  # int32 [B], tokens a row may draw
    keys: Any  # [B], into which a row's counts are folded
    eos_ids: Any  # int32 [E], _NO_TOKEN where there are fewer
    temperature: Any  # float32 []
    top_p: Any  # float32 []
    top_k: Any  # int32 []
    min_p: Any  # float32 []


def _in_compute_dtype(model: Decoder) -> tuple[Any, Any]:
    """The model's graph and state, what trains rounded to the compute dtype: once, and not for every token."""
    graph, *states = nnx.split(model, nnx.LoRAParam, ...)
    return graph, nnx.merge_state(_rounded(states[0], model.compute_dtype), *states[1:])


@partial(jax.jit, static_argnames="dtype")
def _rounded(trained: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda array: array.astype(dtype), trained)


@partial(jax.jit, static_argnames="graph", donate_argnames=("cache", "hidden"))
def _read(
    graph: Any, state: Any, cache: Cache, hidden: jax.Array, tokens: jax.Array, start: jax.Array, lengths: jax.Array
) -> tuple[Cache, jax.Array]:
    """Reads tokens int32 [B, T] that stand at `start` onwards; `hidden` takes rows whose last token is among them."""
    model = nnx.merge(graph, state)
    B, T = tokens.shape
    positions = jnp.broadcast_to(start + jnp.arange(T, dtype=jnp.int32), (B, T))
    out, cache = model(tokens, positions, cache)
    place = lengths - 1 - start
    last = out[jnp.arange(B), jnp.clip(place, 0, T - 1)]
    return cache, jnp.where(((place >= 0) & (place < T))[:, None], last, hidden)


@partial(jax.jit, static_argnames="graph", donate_argnames="cache")
def _read_whole(
    graph: Any, state: Any, cache: Cache, tokens: jax.Array | np.ndarray, lengths: jax.Array | np.ndarray
) -> tuple[Cache, jax.Array]:
    """Reads prompts int32 [B, T] into an empty cache: it, and hidden [B, D] of each row's last token."""
    model = nnx.merge(graph, state)
    out, cache = model(tokens, cache=cache)
    return cache, out[jnp.arange(tokens.shape[0]), lengths - 1]


def _whole(length: int, room: int) -> int:
    """What a piece of so many tokens is filled up to, where it is the whole prompt: one of few lengths, within the
    room. A power of two, or the one and a half of one."""
    power = 1 << (length - 1).bit_length()
    return min(room, 3 * power // 4 if length <= 3 * power // 4 else power)


def draw_tokens(
    graph: Any, state: Any, rows: Rows, settings: Settings, steps: jax.Array | int, width: int
) -> tuple[Rows, jax.Array, jax.Array]:
    """Up to `steps` tokens a row: int32 [B, width], -1 where a row drew none, _BROKEN where its logits were not finite;
    and how many steps were taken."""
    model = nnx.merge(graph, state)

    def unfinished(carry):
        step, rows, _ = carry
        return (step < steps) & ~jnp.all(rows.done)

    def draw(carry):
        step, rows, drawn = carry
        keys = jax.vmap(jax.random.fold_in)(settings.keys, rows.counts)
        logits = model.logits(rows.hidden)
        tokens = next_tokens(logits, keys, settings.temperature, settings.top_p, settings.top_k, settings.min_p)
        broken = largest_magnitude(logits, axis=-1) == jnp.inf
        drawn = drawn.at[:, step].set(jnp.where(rows.done, _NO_TOKEN, jnp.where(broken, _BROKEN, tokens)))
        ended = jnp.any(tokens[:, None] == settings.eos_ids, axis=1)
        out, cache = model(tokens[:, None], rows.lengths[:, None], rows.cache)
        # a row that is done keeps its length: what it still writes lands past its end, where nothing looks
        counts = rows.counts + ~rows.done
        lengths = rows.lengths + (~rows.done & ~ended)
        done = rows.done | ended | broken | (counts >= settings.limits)
        return step + 1, Rows(cache, out[:, 0], lengths, counts, done), drawn

    drawn = jnp.full((rows.done.shape[0], width), _NO_TOKEN, jnp.int32)
    taken, rows, drawn = jax.lax.while_loop(unfinished, draw, (jnp.int32(0), rows, drawn))
    return rows, drawn, taken


_decode = jax.jit(draw_tokens, static_argnames=("graph", "width"), donate_argnames="rows")
_decode_in_graphs = jax.jit(
    draw_tokens, static_argnames=("graph", "width"), donate_argnames="rows", compiler_options=GRAPHS
)


def _grown(cache: Cache, room: int) -> Cache:
    """The cache with room for at least `room` positions."""
    more = max(room - cache.k.shape[2], 0)
    return Cache(*(jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))) for x in cache))


def _padded(length: int) -> int:
    return -(-length // PAD_TO) * PAD_TO
