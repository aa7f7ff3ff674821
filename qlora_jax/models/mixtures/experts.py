"""The experts of a mixture: each token goes through those that its router chose, and no others.

    y_t = sum_j w_tj expert_{c_tj}(x_t);   expert_e(x) = W_down,e (act(W_gate,e x) * W_up,e x)

(token, choice) pairs are sorted by expert and cut into tiles of `tile_rows` rows, none of which has two experts. A loop
goes over as many tiles as there are: it decodes the weights of one expert, multiplies, and adds what comes out to the
tokens' rows. So no token is dropped, an expert without tokens costs nothing, and the 16-bit weights of one expert exist
at a time, whatever their number. Tiles are about as long as an expert's average share: no expert is decoded more than
once and a bit on average. The backward pass goes over the same tiles and computes each again; what it keeps is x, the
choices and the packed weights.

The stacks [L, E, ...] stand outside of the scan over layers: a layer takes its experts' codes from them one by one,
where a scan would copy those of all of a layer's experts, used or not.

Where devices of a mesh have some of the experts each (across.py), E is a device's number of them. It takes the tokens
of all these devices; pairs of others' experts are in no tile.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.nf4_matmul import dense_matmul, low_rank_terms
from qlora_jax.mesh.tensor import entered, first_of, left
from qlora_jax.models.dropout import Dropout, DropoutRate, mix
from qlora_jax.models.kind import Kind
from qlora_jax.models.layers import ACTIVATIONS, Frozen, Linear, part_of
from qlora_jax.models.mixtures import across
from qlora_jax.quant.tensor import QuantizedTensor, dequantize

ROLES = ("gate_up", "gate", "up", "down")  # of a family's linear layers, those that stand in experts
_FEWEST_ROWS = 8  # of a tile, where there are so many tokens: fewer leave a product as long


class Stack(Frozen):
    """The weights of all layers' experts, [L, E, O, I]: what a scan over layers does not cut."""


class Drawn(NamedTuple):
    """LoRA dropout of a layer's experts."""

    words: jax.Array  # uint32 [2], of the layer's key
    rate: DropoutRate
    first_row: Any  # which row of the step's batch x begins with
    first_expert: Any = 0  # which of all experts the first one here is
    first_token: Any = 0  # which token of its rows x begins with


class Frame(NamedTuple):
    """What of a layer's experts does not train, by role."""

    weights: dict[str, Any]  # QuantizedTensor or [L, E, O, I]
    biases: dict[str, jax.Array]  # [E, O]
    scales: dict[str, Any]  # of adapters
    layer: jax.Array  # int32 []
    drawn: Drawn | None = None  # None: no dropout


class How(NamedTuple):
    """What is fixed when a program is compiled."""

    activation: str
    swiglu: tuple[float, float] | None
    T: int  # tokens of a row: where a token stands in the batch, for dropout
    rows: int  # of a tile
    place: int  # of the first of them among the layer's linear layers, as dropout counts
    divided: bool = False  # each device has its part of F, and of what comes out
    ways: int = 1  # devices that have some of the experts each


def stacked(weight: Any, bias: jax.Array | None) -> Linear:
    """A linear layer of all experts; it is never called, `mixture` reads it."""
    layer = Linear(weight, bias)
    layer.weight = Stack(weight)
    return layer


def tile_rows(tokens: int, per_token: int, count: int) -> int:
    """Rows of a tile: a power of two, at least an expert's average share."""
    average = -(-tokens * per_token // count)
    return min(max(1 << (average - 1).bit_length(), _FEWEST_ROWS), tokens)


def mixture(
    block: Any, kind: Kind, x: jax.Array, chosen: jax.Array, weights: jax.Array, layer: jax.Array, dropout: Dropout
) -> jax.Array:
    """x [B, T, D] through the experts chosen int32 [B * T, k] by weights float32 [B * T, k] -> [B, T, D].

    `block`: has the experts' linear layers, under the names of `kind`. `layer`: int32 [], its number.
    """
    assert kind.experts is not None
    roles = [role for role in ROLES if role in kind.linear]
    linears: dict[str, Linear] = {role: part_of(block, kind.linear[role]) for role in roles}
    adapted = {role: linear for role, linear in linears.items() if linear.lora_a is not None}
    adapters = {role: (linear.lora_a.get_value(), linear.lora_b.get_value()) for role, linear in adapted.items()}
    divided = linears["down"].split is not None
    if divided:
        x, weights = entered(x), entered(weights)
    B, T, D = x.shape
    stacks = {role: linear.weight.get_value() for role, linear in linears.items()}
    count = _count(stacks)
    ways = kind.experts.count // count
    place, drawn = dropout.place, None
    if adapters and dropout.words is not None:
        first = across.first_row(ways, dropout.first_row, B), across.first_here(ways, count)
        drawn = Drawn(dropout.words, dropout.rate, *first, dropout.first_token)
    for _ in roles:
        dropout.skip()
    frame = Frame(
        stacks,
        {role: linear.bias.get_value() for role, linear in linears.items() if hasattr(linear, "bias")},
        {role: linear.lora_scale for role, linear in adapted.items()},
        layer,
        drawn,
    )
    rows = tile_rows(ways * B * T, kind.experts.per_token, kind.experts.count)
    how = How(kind.activation, kind.experts.swiglu, T, rows, place, divided, ways)
    y = _through(how, frame, chosen, adapters, weights, x.reshape(B * T, D)).reshape(B, T, D)
    return left(y) if divided else y


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through(how: How, frame: Frame, chosen: jax.Array, adapters: Any, weights: jax.Array, x: jax.Array) -> jax.Array:
    """x [M, D] -> [M, D] in x's dtype, summed over a token's experts in float32."""
    chosen, weights, x = across.from_all(how.ways, (chosen, weights, x))
    tiles = _tiles(how, frame, chosen)

    def add(number: jax.Array, y: jax.Array) -> jax.Array:
        tile = tiles.tile(number)
        given = _expert(how, frame, tile, x.dtype)(_rows(x, tile), _weights(weights, tile), _of(adapters, tile.expert))
        return y.at[tile.tokens].add(given, mode="drop", unique_indices=True)

    y = jax.lax.fori_loop(0, tiles.number, add, jnp.zeros(x.shape, jnp.float32))
    return across.back(how.ways, y).astype(x.dtype)


def _forward(how, frame, chosen, adapters, weights, x):
    return _through(how, frame, chosen, adapters, weights, x), (frame, chosen, adapters, weights, x)


def _backward(how, saved, dy):
    frame, chosen, adapters, weights, x = saved
    chosen, weights, x, dy = across.from_all(how.ways, (chosen, weights, x, dy))
    tiles = _tiles(how, frame, chosen)
    dy = dy.astype(jnp.float32)

    def add(number: jax.Array, sums: Any) -> Any:
        d_adapters, d_weights, dx = sums
        tile = tiles.tile(number)
        expert = _expert(how, frame, tile, x.dtype)
        _, pull = jax.vjp(expert, _rows(x, tile), _weights(weights, tile), _of(adapters, tile.expert))
        fresh_x, fresh_w, fresh = pull(_rows(dy, tile))
        d_adapters = jax.tree.map(lambda total, g: total.at[tile.expert].add(g), d_adapters, fresh)
        d_weights = d_weights.at[tile.pairs].set(fresh_w, mode="drop", unique_indices=True)
        dx = dx.at[tile.tokens].add(fresh_x.astype(jnp.float32), mode="drop", unique_indices=True)
        return d_adapters, d_weights, dx

    zeros = jax.tree.map(jnp.zeros_like, (adapters, weights.reshape(-1))), jnp.zeros(x.shape, jnp.float32)
    d_adapters, d_weights, dx = jax.lax.fori_loop(0, tiles.number, add, (*zeros[0], zeros[1]))
    d_weights, own_dx = (across.back(how.ways, sums) for sums in (d_weights.reshape(weights.shape), dx))
    return None, None, d_adapters, d_weights, own_dx.astype(x.dtype)


_through.defvjp(_forward, _backward)


class _Tile(NamedTuple):
    """Rows of one expert. Numbers of pairs and tokens beyond their end fill the tile: nothing is read or written."""

    expert: jax.Array  # int32 []
    pairs: jax.Array  # int32 [rows], (token, choice) as token * k + choice
    tokens: jax.Array  # int32 [rows]


class _Tiles(NamedTuple):
    """Pairs sorted by expert, cut into tiles. Those of no expert here (their number is E) come last and are in none."""

    order: jax.Array  # int32 [M k], pairs by expert
    starts: jax.Array  # int32 [E], the first of an expert's pairs in that order
    ends: jax.Array  # int32 [E], behind its last
    tile_ends: jax.Array  # int32 [E], behind its last tile
    rows: int
    per_token: int

    @classmethod
    def of(cls, chosen: jax.Array, count: int, rows: int) -> "_Tiles":
        flat = chosen.reshape(-1)
        counts = jnp.zeros(count, jnp.int32).at[flat].add(1, mode="drop")
        ends = jnp.cumsum(counts)
        tile_ends = jnp.cumsum(-(-counts // rows))
        return cls(jnp.argsort(flat, stable=True), ends - counts, ends, tile_ends, rows, chosen.shape[1])

    @property
    def number(self) -> jax.Array:
        return self.tile_ends[-1]

    def tile(self, number: jax.Array) -> _Tile:
        expert = jnp.searchsorted(self.tile_ends, number, side="right").astype(jnp.int32)
        first, end = self.starts[expert], self.ends[expert]
        its_first = self.tile_ends[expert] + (first - end) // self.rows  # minus its tiles: the quotient rounds down
        places = first + (number - its_first) * self.rows + jnp.arange(self.rows, dtype=jnp.int32)
        pairs = self.order.at[places].get(mode="clip")
        beyond = len(self.order) + jnp.arange(self.rows, dtype=jnp.int32)  # all different, as scattering promises
        inside = places < end
        return _Tile(expert, jnp.where(inside, pairs, beyond), jnp.where(inside, pairs // self.per_token, beyond))


def _count(stacks: dict[str, Any]) -> int:
    """E."""
    return jax.tree.leaves(stacks["down"])[0].shape[1]


def _tiles(how: How, frame: Frame, chosen: jax.Array) -> _Tiles:
    count = _count(frame.weights)
    return _Tiles.of(across.here(how.ways, chosen, count), count, how.rows)


def _rows(x: jax.Array, tile: _Tile) -> jax.Array:
    return x.at[tile.tokens].get(mode="fill", fill_value=0)


def _weights(weights: jax.Array, tile: _Tile) -> jax.Array:
    return weights.reshape(-1).at[tile.pairs].get(mode="fill", fill_value=0)


def _of(arrays: Any, expert: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, expert, keepdims=False), arrays)


def _decoded(stack: Any, layer: jax.Array, expert: jax.Array, dtype: Any) -> jax.Array:
    """W [O, I] of one expert. In a stack of one layer it is that layer's: a slice begins no later than it can."""

    def cut(leaf: jax.Array) -> jax.Array:
        start: Any = (layer, expert, *(0,) * (leaf.ndim - 2))
        return jax.lax.dynamic_slice(leaf, start, (1, 1, *leaf.shape[2:])).reshape(leaf.shape[2:])

    one = jax.tree.map(cut, stack)
    return dequantize(one, dtype) if isinstance(one, QuantizedTensor) else one.astype(dtype)


def _expert(how: How, frame: Frame, tile: _Tile, dtype: Any) -> Any:
    """(x [rows, D], weights [rows], adapters of the expert) -> float32 [rows, D], with the expert's weights decoded."""
    dense = {role: _decoded(stack, frame.layer, tile.expert, dtype) for role, stack in frame.weights.items()}
    biases = _of(frame.biases, tile.expert)
    activation = ACTIVATIONS[how.activation]

    def project(role: str, x: jax.Array, adapters: Any) -> jax.Array:
        y = dense_matmul(x, dense[role], contract=1)
        if role in biases:
            y = y + biases[role].astype(y.dtype)
        if role not in adapters:
            return y
        dropped = x if frame.drawn is None else _dropped(how, frame.drawn, tile, role, list(dense).index(role), x)
        a, b = adapters[role]
        return y + low_rank_terms(dropped[None], (a,), (b,), (frame.scales[role],))

    def expert(x: jax.Array, weights: jax.Array, adapters: Any) -> jax.Array:
        if "gate_up" in dense:
            both = project("gate_up", x, adapters)
            gate, up = both[:, ::2], both[:, 1::2]
        else:
            gate, up = project("gate", x, adapters), project("up", x, adapters)
        if how.swiglu is None:
            inner = activation(gate) * up
        else:
            alpha, limit = how.swiglu
            gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
            inner = (up + 1) * gate * jax.nn.sigmoid(gate * alpha)
        return project("down", inner, adapters).astype(jnp.float32) * weights[:, None]

    return expert


def _dropped(how: How, drawn: Drawn, tile: _Tile, role: str, number: int, x: jax.Array) -> jax.Array:
    """x [rows, I] as models/dropout drops it; the bits depend on the expert too, and on no other token."""
    row = tile.tokens // how.T + jnp.asarray(drawn.first_row)
    token = mix(drawn.words[0] ^ jnp.uint32(how.place + number + 1))
    place = tile.tokens % how.T + jnp.asarray(drawn.first_token)
    for part in (tile.expert + jnp.asarray(drawn.first_expert), row, place):
        token = mix(token + part.astype(jnp.uint32))
    other = mix(token ^ drawn.words[1])
    features = jnp.arange(x.shape[1], dtype=jnp.uint32)
    if how.divided and role == "down":
        features = features + first_of(x.shape[1]).astype(jnp.uint32)
    bits = mix(mix(token[:, None] + features) ^ other[:, None])
    keep = (bits >> 16) >= jnp.asarray(drawn.rate.threshold, jnp.uint32)
    scale = jax.lax.optimization_barrier(jnp.asarray(drawn.rate.kept_scale, jnp.float32)).astype(x.dtype)
    return jnp.where(keep, x * scale, jnp.zeros((), x.dtype))
