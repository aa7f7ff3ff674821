"""Decoding with a KV cache: prompts in, tokens out, a chunk of steps to a device call.

Prompts are right-padded to a multiple of 64 and read into the cache in pieces of at most 256 tokens, so few programs
are compiled and the scores of a long prompt never stand in memory at once. Decoding is one `lax.while_loop` a chunk,
sampling included; it ends early when every row is done. What a padded position leaves in the cache is overwritten
before any query can see it (a key is seen from its own position on). Model arrays are arguments of the programs, and
programs are kept between calls.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.errors import InputError
from qlora_jax.generate.sampling import Sampling, next_tokens
from qlora_jax.models.llama import Cache, Llama

PAD_TO = 64  # tokens; prompt lengths and cache sizes are multiples of it
PREFILL = 256  # tokens of each prompt read at a time
CHUNK = 64  # decoding steps of a device call when nobody watches


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
    model: Llama,
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


def complete(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_ids: Sequence[int],
    batch_size: int = 16,
    stop: Callable[[int, Sequence[int]], bool] = lambda number, tokens: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Completion]:
    """Continues every prompt.

    Args:
      model: on its device; any adapter on it is used, without dropout.
      prompts: token ids, BOS included where the model wants it; at least one token each.
      sampling: see Sampling. A row's draws depend on its place in `prompts` and the step alone; the batch it stands in
        changes logits by no more than rounding.
      eos_ids: ids that end an answer.
      batch_size: prompts decoded together, longest first.
      stop: asked now and then with (place in `prompts`, new tokens) of an unfinished row; True ends it.
      progress: called with (prompts done, prompts in all).
    Raises:
      InputError: a prompt is empty, has an id outside the vocabulary, or leaves no room in the model's context.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected at least 1")
    for number, prompt in enumerate(prompts):
        check_prompt(prompt, model, f"prompt {number + 1}")
    if not prompts:
        return []
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    room = room_for(model, len(prompts[order[0]]), sampling.max_new_tokens)
    finished: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        fill = batch_size - len(numbers) if start else 0  # the last batch runs the others' program
        batch = Decoding(model, [prompts[number] for number in numbers], sampling, eos_ids, numbers, room, fill)
        while not batch.done:
            batch.step(CHUNK)
            for row in batch.unfinished():
                if stop(numbers[row], batch.tokens[row]):
                    batch.finish(row, "stop")
            progress(len(finished) + len(numbers) - len(batch.unfinished()), len(prompts))
        finished |= {number: Completion(*end) for number, end in zip(numbers, batch.ends(), strict=True)}
    return [finished[number] for number in range(len(prompts))]


def check_prompt(prompt: Sequence[int], model: Llama, name: str) -> None:
    """Raises InputError unless the prompt has tokens, all of the vocabulary, and leaves room for one more."""
    V, context = model.config.V, model.config.context
    if not prompt:
        raise InputError(f"{name} has no token; expected at least one (BOS for a model that has it)")
    outside = next((token for token in prompt if not 0 <= token < V), None)
    if outside is not None:
        raise InputError(f"{name} has token id {outside}; the model knows 0 to {V - 1} (is it its tokenizer?)")
    if len(prompt) >= context:
        raise InputError(
            f"{name} has {len(prompt)} tokens; the model's context of {context} leaves no room for an answer"
        )


def room_for(model: Llama, length: int, max_new_tokens: int) -> int:
    """Cache positions that a prompt of this length and its answer need, padded."""
    return _padded(min(length + max_new_tokens, model.config.context))


class Decoding:
    """A batch of prompts on their way: read on construction, continued by `step`.

    Args:
      numbers: what stands for each row in its random keys.
      room: cache positions S, at least `room_for` every prompt.
      fill: rows to add that count as done, so that a smaller batch can use a larger one's program.
      earlier: a decoding of one row whose cache is taken over, so that what its row and the one prompt have in common
        is not read again. It cannot be used afterwards.
    Attributes:
      tokens: new tokens of each row so far, end token left out.
    Prompts are taken to be checked (`check_prompt`).
    """

    def __init__(
        self,
        model: Llama,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        eos_ids: Sequence[int],
        numbers: Sequence[int],
        room: int,
        fill: int = 0,
        earlier: "Decoding | None" = None,
    ):
        self._graph, self._state = nnx.split(model)
        self._sampling, self._eos_ids = sampling, frozenset(eos_ids)
        self._prompts = [list(prompt) for prompt in prompts]
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self._reasons: list[str | None] = [None] * len(prompts)
        self._limits = [min(sampling.max_new_tokens, model.config.context - len(prompt)) for prompt in prompts]
        B = len(prompts) + fill
        start, cache = (0, None) if earlier is None else earlier._hand_over(self._prompts[0])
        cache = model.new_cache(B, room) if cache is None else _grown(cache, room)
        lengths = np.asarray([*map(len, prompts), *[1] * fill], np.int32)
        hidden = jnp.zeros((B, model.config.D), model.compute_dtype)
        padded = np.zeros((B, _padded(int(lengths.max()) - start)), np.int32)
        for row, prompt in enumerate(self._prompts):
            padded[row, : len(prompt) - start] = prompt[start:]
        for offset in range(0, padded.shape[1], PREFILL):
            piece = padded[:, offset : offset + PREFILL]
            cache, hidden = _read(self._graph, self._state, cache, hidden, piece, jnp.int32(start + offset), lengths)
        done = np.arange(B) >= len(prompts)
        self._rows = Rows(cache, hidden, jnp.asarray(lengths), jnp.zeros(B, jnp.int32), jnp.asarray(done))
        self._settings = Settings(
            limits=jnp.asarray([*self._limits, *[0] * fill], jnp.int32),
            numbers=jnp.asarray([*numbers, *[0] * fill], jnp.uint32),
            eos_ids=jnp.asarray(sorted(self._eos_ids), jnp.int32),
            key=jax.random.key(sampling.seed),
            temperature=jnp.float32(sampling.temperature),
            top_p=jnp.float32(sampling.top_p),
        )

    def step(self, steps: int) -> list[list[int]]:
        """Decodes up to `steps` tokens a row and returns the new ones, [] for rows that are done."""
        self._rows, drawn = _decode(self._graph, self._state, self._rows, self._settings, steps)
        new: list[list[int]] = []
        for row, ids in enumerate(np.asarray(drawn)[: len(self.tokens)].tolist()):
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
        self._rows = self._rows._replace(done=self._rows.done.at[row].set(True))

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
    """What stays the same while a batch is decoded."""

    limits: jax.Array  # int32 [B], tokens a row may draw
    numbers: jax.Array  # uint32 [B], folded into a row's keys
    eos_ids: jax.Array  # int32 [E]
    key: jax.Array
    temperature: jax.Array  # float32 []
    top_p: jax.Array  # float32 []


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


@partial(jax.jit, static_argnames=("graph", "steps"), donate_argnames="rows")
def _decode(graph: Any, state: Any, rows: Rows, settings: Settings, steps: int) -> tuple[Rows, jax.Array]:
    """Up to `steps` tokens a row: int32 [B, steps], -1 where a row drew none."""
    model = nnx.merge(graph, state)

    def unfinished(carry):
        step, rows, _ = carry
        return (step < steps) & ~jnp.all(rows.done)

    def draw(carry):
        step, rows, drawn = carry
        keys = jax.vmap(lambda number, count: jax.random.fold_in(jax.random.fold_in(settings.key, number), count))(
            settings.numbers, rows.counts
        )
        tokens = next_tokens(model.logits(rows.hidden), keys, settings.temperature, settings.top_p)
        drawn = drawn.at[:, step].set(jnp.where(rows.done, -1, tokens))
        ended = jnp.any(tokens[:, None] == settings.eos_ids, axis=1)
        out, cache = model(tokens[:, None], rows.lengths[:, None], rows.cache)
        # a row that is done keeps its length: what it still writes lands past its end, where nothing looks
        counts = rows.counts + ~rows.done
        lengths = rows.lengths + (~rows.done & ~ended)
        done = rows.done | ended | (counts >= settings.limits)
        return step + 1, Rows(cache, out[:, 0], lengths, counts, done), drawn

    drawn = jnp.full((rows.done.shape[0], steps), -1, jnp.int32)
    _, rows, drawn = jax.lax.while_loop(unfinished, draw, (jnp.int32(0), rows, drawn))
    return rows, drawn


def _grown(cache: Cache, room: int) -> Cache:
    """The cache with room for at least `room` positions."""
    more = max(room - cache.k.shape[2], 0)
    return Cache(*(jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))) for x in cache))


def _padded(length: int) -> int:
    return -(-length // PAD_TO) * PAD_TO
