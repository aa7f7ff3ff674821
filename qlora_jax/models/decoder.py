"""The decoder: embedding, stacked layers in one scan, final norm and head, for whatever family its Kind describes."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.attention import refusal
from pallas_kernels.nf4_matmul import dense_matmul
from qlora_jax.errors import InputError
from qlora_jax.mesh import sequence
from qlora_jax.mesh.shards import Shards
from qlora_jax.models.attention import for_prompts, segment_starts
from qlora_jax.models.block import Block, Cache, Context
from qlora_jax.models.chunks import chunk_size, layer_in_chunks, not_shared
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.dropout import Dropout, DropoutKey, DropoutRate
from qlora_jax.models.head import Head, head_logits
from qlora_jax.models.layers import Frozen, NoNorm, Norm, Projected
from qlora_jax.models.mixtures.experts import Stack
from qlora_jax.models.mixtures.router import Balance
from qlora_jax.models.rope import Rotation, depends_on_length, rotation

REMAT = ("none", "selective", "block", "block+offload")


class Decoder(nnx.Module):
    """Decoder over stacked blocks.

    Args:
      config: sizes.
      weights: those of config.outer ("embedding" [V, D], "norm" float32 [D], "head" [V, D], absent when tied, ...);
        "layers": name -> stacked array, names as in config.linears (QuantizedTensor or [L, O, I]) and config.vectors.
      compute_dtype: of activations and matmuls.
      remat: one of REMAT. "block" keeps one activation a layer and recomputes the rest in the backward pass, "none"
        keeps everything. To train/backward.py "selective" is "block" that keeps the values with names too, and
        "block+offload" "block" whose activations go to host memory.
      attention: one of attention.IMPLEMENTATIONS.
      sequence_chunk: tokens; longer sequences go through a layer in chunks of so many, with chunked attention whatever
        `attention` says. 0 is off.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Any],
        compute_dtype: Any,
        remat: str = "block",
        attention: str = "auto",
        sequence_chunk: int = 0,
    ):
        self.config = config
        self.compute_dtype = jnp.dtype(compute_dtype)
        self.remat, self.attention, self.sequence_chunk = remat, attention, sequence_chunk
        self.dropout_rate: Any = 0.0  # a number, or a DropoutRate of the program's inputs
        self.router_aux_loss_coef = 0.0  # of a mixture's auxiliary loss in training (train/backward.py)
        self.shards: Shards | None = None  # of a mesh; this model's arrays are one device's parts then (mesh/shards.py)
        self.residual = ""  # the adapter's start whose part the linear layers lack, if there is one
        kind = config.kind
        self.embedding = Frozen(weights["embedding"])
        self.blocks = Block(config, weights["layers"])
        self.norm: Any = _norm(config, weights, "norm") if kind.final_norm else NoNorm()
        if kind.project_in:
            self.project_in, self.norm = Frozen(weights["project_in"]), Projected(self.norm, weights["project_out"])
        self.head = nnx.data(None if config.tied else Frozen(weights["head"]))
        if kind.head_bias:
            self.head_bias = Frozen(weights["head.bias"])
        if kind.positions:
            self.positions = Frozen(weights["positions"])
        if kind.embedding_norm:
            self.embedding_norm = _norm(config, weights, "embedding_norm")

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        dropout_key: jax.Array | DropoutKey | None = None,
        segments: jax.Array | None = None,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Final hidden states.

        Args:
          tokens: int32 [B, T]; padding stands at the right, where causality hides it.
          positions: int32 [B, T]; 0..T-1 by default. With a cache, also the places that are written; by default they
            are its first, and attention is that of training.
          cache: keys and values of earlier calls; None attends to these T tokens alone.
          dropout_key: of LoRA dropout; None is no dropout. A DropoutKey says which rows of a step's batch these are.
          segments: int32 [B, T] ids of the examples packed into each row, equal ones side by side; a token sees its own
            segment alone, whose positions begin at 0. None: a row is one example. Not with a cache.
          lengths: int32 [B], tokens of each row without its padding, where a rope's turn depends on them; None: T,
            or the longest segment's. With a cache its room decides.
        Returns:
          hidden [B, T, config.head_width] after the final norm, and the cache with these tokens added, if there is one;
          of a device that has a part of each row that part alone, as `own` has it.
        """
        T = tokens.shape[1]
        if cache is None:
            lengths = self.lengths(tokens, segments) if lengths is None else lengths
            tokens = self.pad(tokens)
            positions, segments = (None if x is None else self.pad(x) for x in (positions, segments))
        else:
            lengths = jnp.full(tokens.shape[0], self.length_of_room(cache.k.shape[2]))
        context = self.context(tokens, positions, segments, lengths)
        if positions is None and cache is not None:
            B, config = tokens.shape[0], self.config
            implementation = for_prompts(self.attention, (B, T, config.N, config.H), self.compute_dtype)
            context = context._replace(is_new=True, implementation=implementation)
        block, *state = self.layers(nnx.LoRAParam, ...)
        apply_layer = partial(self.apply_layer, block, context, dropout_key)

        def step(carry, inputs):
            (x, cache), (state, layer) = carry, inputs
            stacks = None
            if self.shards is not None and self.shards.gathers:
                adapter, frozen = state
                state = self.shards.adapter(adapter, self.compute_dtype), self.shards.whole(frozen)
                stacks = self.gathered_stacks(layer)
            return apply_layer(tuple(state), x, layer, cache, stacks=stacks), None

        if self.remat != "none" and cache is None:
            step = jax.checkpoint(step, prevent_cse=False)  # a scan's body is not merged with its forward
        x = self.embed(self.own(tokens), context.positions)
        (x, cache), _ = jax.lax.scan(step, (x, cache), (state, jnp.arange(self.config.L)))
        return self.norm(x if self.divides_tokens else x[:, :T]), cache

    def pad(self, tokens: jax.Array) -> jax.Array:
        """[B, T] with zeros (False) at the right, as the chunks of a long sequence and the devices that divide one need
        them; causality hides them."""
        T = tokens.shape[1]
        parts = self.shards.axes.sequence if self.shards is not None else 1
        mine = -(-T // parts)
        if self._is_chunked(mine):
            mine += -mine % chunk_size(mine, self.sequence_chunk)
        return tokens if parts * mine == T else jnp.pad(tokens, ((0, 0), (0, parts * mine - T)))

    @property
    def divides_tokens(self) -> bool:
        """Whether this device has a part of each row's tokens, of several (mesh/sequence.py)."""
        return self.shards is not None and self.shards.divides_tokens

    def own(self, x: jax.Array) -> jax.Array:
        """Of [B, T], as `pad` makes it: this device's tokens, all or a part."""
        return sequence.own(x) if self.divides_tokens else x

    def followed(self, x: jax.Array) -> jax.Array:
        """As `own` of [B, T] before `pad` or after it, with the token that follows a part, as train/loss takes it."""
        return sequence.own_and_next(self.pad(x)) if self.divides_tokens else x

    def at_places(self, hidden: jax.Array, places: jax.Array) -> jax.Array:
        """Of hidden states, as a call gives them, those of one place of each row, int32 [B]: [B, D]."""
        if self.divides_tokens:
            return sequence.at_places(hidden, places)
        return hidden[jnp.arange(hidden.shape[0]), places]

    def _is_chunked(self, T: int) -> bool:
        return 0 < self.sequence_chunk < T

    def lengths(self, tokens: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        """int32 [B]: tokens of each row [B, T] as a rope takes them that depends on it, before `pad`."""
        if segments is None:
            return jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        return jnp.max(places - segment_starts(segments), axis=1) + 1

    @staticmethod
    def length_of_room(S: int) -> int:
        """The shortest sequence that a cache with room for S tokens is made for: rooms are multiples of 64.

        A rope that turns otherwise in long sequences is decided by it once, for all keys in the cache.
        """
        return max(S - 63, 1)

    def turns_alike(self, S: int, room: int) -> bool:
        """Whether keys of a cache with room for S tokens stand in one with other room as they were turned."""
        if not self._turns_by_length():
            return True
        lengths = [jnp.asarray([self.length_of_room(size)]) for size in (S, max(S, room))]
        before, after = (self.rotation(length) for length in lengths)
        return before is None or after is None or bool(jnp.array_equal(before.inverse, after.inverse))

    def context(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        lengths: jax.Array | None = None,
    ) -> Context:
        """What every layer shares, for tokens [B, T] at positions int32 [B, T] (0..T-1 of each segment by default).

        Of a device that has a part of each row: for that part of the [B, T] that all are given.
        """
        self.check_attention(tokens.shape[1])
        starts = None if segments is None else segment_starts(segments)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
            positions = positions if starts is None else positions - starts
        first = sequence.first_of(tokens.shape[1]) if self.divides_tokens else None
        positions, starts = self.own(positions), None if starts is None else self.own(starts)
        rotation = self.rotation(lengths)
        turn = None if rotation is None else rotation.at(positions)
        return Context(positions, turn, self.attention, starts, first=first)

    def _turns_by_length(self) -> bool:
        return depends_on_length(((self.config.rope_theta, self.config.rope_scaling), self.config.kind.local_rope))

    def rotation(self, lengths: jax.Array | None) -> Rotation | None:
        config, kind = self.config, self.config.kind
        if not kind.rotary:
            return None
        own = (config.rope_theta, config.rope_scaling)
        lengths = lengths if self._turns_by_length() else None
        return rotation(own, kind.local_rope, kind.layer_ropes, kind.rotary_width or config.H, lengths)

    def check_attention(self, T: int) -> None:
        """Raises InputError where the attention that was asked for is not for this model, or rows of T tokens."""
        kind = self.config.kind
        if self.attention == "flash" and not self._is_chunked(T):
            reason = refusal(T, self.config.N, self.config.H, self.compute_dtype)
            if reason is not None:
                raise InputError(f'model.attention is "flash", but {reason}: set model.attention=auto')
        if self.attention == "cudnn" and (any(kind.windows) or kind.softcap or kind.alibi or kind.sinks):
            raise InputError(
                'model.attention is "cudnn", which JAX calls without windows, soft caps, ALiBi and sinks; this model '
                "has some of them: set model.attention=auto"
            )

    def embed(self, tokens: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """[B, T] at positions int32 [B, T] (0..T-1 by default) -> [B, T, D] in the compute dtype."""
        return self.enter(self._looked_up(tokens), positions)

    def _looked_up(self, tokens: jax.Array) -> jax.Array:
        table = self.embedding.get_value()
        if self.shards is not None and self.shards.splits_embedding:
            return self.shards.lookup(table, tokens)
        return table[tokens]

    def enter(self, rows: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Rows of the embedding [B, T, D] -> what the first layer takes: scaled, with learned positions, normed."""
        kind = self.config.kind
        x = rows.astype(self.compute_dtype)
        if kind.embedding_scale != 1:
            x = x * jnp.asarray(kind.embedding_scale, self.compute_dtype)
        if kind.project_in:
            x = dense_matmul(x, self.project_in.get_value().astype(x.dtype), contract=1)
        if kind.positions:
            table = self.positions.get_value()
            places = jnp.arange(x.shape[1]) if positions is None else positions
            # a place beyond the table is a padding's: the checks of lengths keep tokens within it
            x = x + table[jnp.minimum(places + kind.position_offset, len(table) - 1)].astype(x.dtype)
        return self.embedding_norm(x) if kind.embedding_norm else x

    def embedding_gradient(self, tokens: jax.Array, positions: jax.Array, dx: jax.Array) -> jax.Array:
        """Gradient [B, T, D] of the rows that tokens [B, T] take, from that of `embed`."""
        if self.config.kind.plain_embedding:
            return dx
        _, pull = jax.vjp(lambda rows: self.enter(rows, positions), self._looked_up(tokens))
        return pull(dx)[0]

    def add_to_embedding(self, sums: jax.Array, tokens: jax.Array, dx: jax.Array) -> jax.Array:
        """sums [V, D] with dx [B, T, D] added to the rows that tokens [B, T] take."""
        if self.shards is not None and self.shards.splits_embedding:
            return self.shards.add_rows(sums, tokens, dx)
        return sums.at[tokens].add(dx.astype(sums.dtype))

    def layers(self, *filters: Any) -> tuple[Any, ...]:
        """(graph of one block, its stacked state, one for each filter of nnx.split): what a scan runs over.

        The stacks of experts are not in it: `apply_layer` takes them whole.
        """
        graph, _, *states = nnx.split(self.blocks, Stack, *filters)
        return graph, *states

    def gathered_stacks(self, layer: Any) -> Any:
        """The stacks of one layer's experts from all devices of a mesh: [1, E, ...], where `layers` are [L, E, ...].

        None where each device computes with those that it has.
        """
        assert self.shards is not None
        stacks = nnx.state(self.blocks, Stack)
        return self.shards.layer(stacks, layer, keepdims=True) if self.shards.gathers_some(stacks) else None

    def apply_layer(
        self,
        block: Any,
        context: Context,
        dropout_key: jax.Array | DropoutKey | None,
        state: tuple[Any, Any],
        x: jax.Array,
        layer: jax.Array,
        cache: Cache | None = None,
        balance: Balance | None = None,
        stacks: Any = None,
    ) -> tuple[jax.Array, Cache | None]:
        """One layer: x [B, T, D] -> [B, T, D], and the cache with its keys and values.

        `state`: the layer's slice of `layers(nnx.LoRAParam, ...)`: adapter and frozen arrays. Where the sequence is cut
        into chunks T is what `pad` makes of it, and the frozen arrays get no gradient. `balance`: of the auxiliary loss
        of a mixture, which is not there in chunks. `stacks`: those of the layer's experts alone, as `gathered_stacks`
        has them; None: the model's own.
        """
        key = None if dropout_key is None else DropoutKey.of(dropout_key).of_layer(layer)
        stacks = nnx.state(self.blocks, Stack) if stacks is None else stacks
        context = context._replace(layer=layer, balance=balance)
        if cache is None and self._is_chunked(x.shape[1]):
            adapter, frozen = state
            pieces = _ChunkedBlock(block, chunk_size(x.shape[1], self.sequence_chunk))
            drawn = None if key is None else (key, DropoutRate.of(self.dropout_rate))
            arrays = (frozen, stacks, context.positions, context.starts, context.turn, layer, drawn, context.first)
            share = sequence.of_all if self.divides_tokens else not_shared
            return layer_in_chunks(pieces.keys_values, share, pieces.rest, pieces.size, arrays, adapter, x), None
        if key is not None and context.first is not None:
            key = key._replace(first_token=context.first)
        return nnx.merge(block, *state, stacks)(x, context, cache, layer, Dropout(self.dropout_rate, key))

    def head_weight(self) -> jax.Array | Head:
        """What head_logits takes: [V, D], the output head or the embedding it is tied to, or a Head that is more."""
        kind = self.config.kind
        weight = (self.embedding if self.head is None else self.head).get_value()
        axes = () if self.shards is None else self.shards.head_axes(self.head is None)
        if not kind.head_bias and kind.logit_scale == 1 and not kind.logit_softcap and not axes:
            return weight
        bias = self.head_bias.get_value() if kind.head_bias else None
        return Head(weight, bias, kind.logit_scale, kind.logit_softcap, axes)

    def outer(self, slot: str) -> jax.Array:
        """One of config.outer, as the model holds it: outer("norm.bias")."""
        own = {"head.bias": "head_bias"}.get(slot, slot)
        part, _, bias = own.partition(".")
        if part == "project_out":
            return self.norm.weight.get_value()
        found = getattr(self, part)
        if isinstance(found, Projected):
            found = found.norm
        if isinstance(found, Norm):
            found = found.bias if bias else found.weight
        return found.get_value()

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> float32 [..., V]."""
        return head_logits(hidden, self.head_weight())

    def new_cache(self, B: int, S: int) -> Cache:
        """An empty cache with room for S positions of B rows."""
        shape = (self.config.L, B, S, self.config.K, self.config.H)
        return Cache(jnp.zeros(shape, self.compute_dtype), jnp.zeros(shape, self.compute_dtype))


class _ChunkedBlock(NamedTuple):
    """A block as the two functions of `layer_in_chunks`.

    Dropout depends on the layer's key, the function, the projection and a value's place in the batch alone, not on how
    rows are cut into chunks or among devices.
    """

    graph: Any
    size: int  # tokens of a chunk

    def keys_values(self, arrays: Any, adapter: Any, x: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        block, context, dropout = self._open(arrays, adapter, first, 0)
        return block.given(x, context, dropout)

    def rest(self, arrays: Any, adapter: Any, kv: Any, x: jax.Array, first: jax.Array) -> jax.Array:
        block, context, dropout = self._open(arrays, adapter, first, 1)
        return block.rest(x, kv, first if context.first is None else context.first + first, context, dropout)

    def _open(self, arrays: Any, adapter: Any, first: jax.Array, place: int) -> tuple[Block, Context, Dropout]:
        frozen, stacks, positions, starts, turn, layer, dropout, of_device = arrays
        key, rate = (None, 0.0) if dropout is None else dropout
        if key is not None:
            before = first if of_device is None else of_device + first
            key = key.fold_in(place)._replace(first_token=before)
        positions = jax.lax.dynamic_slice_in_dim(positions, first, self.size, axis=1)
        if starts is not None:
            starts = jax.lax.dynamic_slice_in_dim(starts, first, self.size, axis=1)
        turn = None if turn is None else turn.cut(first, self.size)
        context = Context(positions, turn, "chunked", starts, layer, first=of_device)
        return nnx.merge(self.graph, adapter, frozen, stacks), context, Dropout(rate, key)


def _norm(config: ModelConfig, weights: dict[str, Any], name: str) -> Norm:
    return Norm(weights[name], config.norm_eps, config.kind.norm, weights.get(f"{name}.bias"))
