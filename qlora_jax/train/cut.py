"""How a step's rows are cut into micro-batches, and what of a layer is kept, where the config says "auto".

The fastest cut that fits. What cuts share is left out of their times, which are those of one step on an H200, measured
and estimated per kernel (seconds; P weights of linear layers, L layers, D width):

    a micro-batch     L * LAUNCHES + passes * P * DEQUANTIZE          whatever its rows: fewer micro-batches take less
    a token           passes * P * MULTIPLY + L * D * ELEMENTWISE     the same in every cut but for the passes
    an offloaded row  its block inputs over the bus, there and back

Passes over the frozen weights: forward and d x; and where the layer is computed again, all products but the last.
Another card has other rates, but no other order of the cuts that matters: large micro-batches first, then products that
are not done again. "none" is never chosen: it spares no product that "selective" does not, and takes over twice the
memory.

Bytes are linear in rows. `temporary_bytes` says them without compiling anything, and a test holds it to compiled
programs; whoever chooses compiles the cut that is chosen, and takes the next one where it does not fit after all.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from qlora_jax.models.attention import chosen
from qlora_jax.models.chunks import chunk_size
from qlora_jax.models.sizes import active_share, linear_weights
from qlora_jax.optim.residency import reserved
from qlora_jax.quant import int8
from qlora_jax.settings import AUTO
from qlora_jax.train.backward import kept_bytes
from qlora_jax.train.shapes import ModelSpec

REMATS = ("selective", "block", "block+offload")  # what "auto" chooses from
TOKENS = 2048  # of a micro-batch, on devices that state no memory limit: CPUs, where larger ones are no faster

LAUNCHES = 0.76e-3  # seconds a layer
DEQUANTIZE = 5.3e-13  # seconds a weight
MULTIPLY = 3.0e-15  # seconds a weight and token
ELEMENTWISE = 2.5e-10  # seconds a token and feature of a layer's width
BUS_BYTES_PER_SECOND = 25e9
# what of a layer lives at once beside what is kept, in widths D and F of a token, and bytes a score of attention and a
# logit; fitted to compiled programs of 7B to 65B on Ampere, Ada and Hopper
WIDTHS, KEEPS_F_WIDTHS = (12, 9), (22, 4)  # the second where gate and up are kept
SCORE, LOGIT = 4, 6
INT8_SUM = 8  # of an int8 product; of a 7B alone (16 rows of 576 on an H100: block 7.09 GB compiled, 7.54 by this)
PASSES = {"none": 2.0, "selective": 2.0, "block": 2.78, "block+offload": 2.78}


class Cut(NamedTuple):
    """Of an optimizer step's rows."""

    rows: int  # of a micro-batch
    remat: str  # one of models/decoder.REMAT


class ToCut(NamedTuple):
    """What is to be cut."""

    model: ModelSpec
    rows: int  # of an optimizer step
    T: int  # tokens of the longest row
    loss_chunk: int  # tokens whose logits exist at a time
    grad_accum: Any  # micro-batches, or AUTO
    remat: str  # one of REMAT, or AUTO

    @classmethod
    def of(cls, config: Any, model: ModelSpec, rows: int, T: int) -> "ToCut":
        """`rows` of T tokens, as a config wants them cut."""
        return cls(model, rows, T, config.train.loss_chunk, config.train.grad_accum, config.model.remat)

    @property
    def is_open(self) -> bool:
        return AUTO in (self.grad_accum, self.remat)


class Choice(NamedTuple):
    """A cut, and why it is that one."""

    cut: Cut
    reason: str


def choose(
    wanted: ToCut,
    held: int,
    limit: int | None,
    fits: Callable[[Cut], bool] = lambda cut: True,
    members: int = 1,
) -> Choice:
    """The fastest cut that fits, or the one that the config names.

    Args:
      held: bytes that stand on the device in every cut: base, adapters, gradients, and state that never leaves it.
      limit: bytes that the device's allocator may give out; None where it states none (CPUs).
      fits: compiles a cut that should fit, and says whether it does within `room_for_cuts`.
      members: of a pack, that compute side by side.
    Returns:
      Where none fits that which takes least.
    """
    if not wanted.is_open:
        return Choice(default_cut(wanted), "as the config says")
    if limit is None:
        return Choice(default_cut(wanted), f"auto: this device states no memory limit, so up to {TOKENS:,} tokens")
    room = room_for_cuts(held, limit)
    possible = cuts(wanted)
    for cut in possible:
        if temporary_bytes(wanted, cut, members) <= room and fits(cut):
            return Choice(cut, f"auto: the fastest that fits {room / 2**30:.2f} GiB beside model and gradients")
    least = min(possible, key=lambda cut: temporary_bytes(wanted, cut))
    why = "model and gradients leave no room"
    if room > 0:
        why = f"none fits {room / 2**30:.2f} GiB beside model and gradients"
    return Choice(least, f"auto: {why}; this takes least")


def room_for_cuts(held: int, limit: int) -> int:
    """Bytes for what depends on the cut. A share of the limit is left free, as beside optimizer state."""
    return limit - reserved(limit) - held


def default_cut(wanted: ToCut) -> Cut:
    """As the config says; what that leaves open as on devices that state no memory limit."""
    remat = "block" if wanted.remat == AUTO else wanted.remat
    if wanted.grad_accum != AUTO:
        return Cut(wanted.rows // math.gcd(wanted.grad_accum, wanted.rows), remat)
    together = max(1, TOKENS // wanted.T)
    return Cut(max(rows for rows in _divisors(wanted.rows) if rows <= together), remat)


def with_cut(config: Any, wanted: ToCut, cut: Cut) -> Any:
    """A copy of a ConfigDict that names the cut."""
    named = config.copy_and_resolve_references()
    with named.ignore_type():
        named.train.grad_accum, named.model.remat = wanted.rows // cut.rows, cut.remat
    return named


def described(wanted: ToCut, choice: Choice) -> str:
    """A line for the user, on a cut that is not the config's own."""
    rows, remat = choice.cut
    if not wanted.is_open:
        asked = f"not {wanted.grad_accum}: the file's batches are smaller"
        return f"data: {wanted.rows // rows} micro-batches a step, {asked}"
    return f"cut: {in_words(wanted.rows // rows, rows)} a step, remat {remat} ({choice.reason})"


def in_words(G: int, rows: int) -> str:
    return f"{G} micro-batch{'es' * (G > 1)} of {rows} row{'s' * (rows > 1)}"


def _divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def cuts(wanted: ToCut) -> list[Cut]:
    """All that the config leaves open, the fastest first; of equally fast ones that which takes less memory."""
    rows = _divisors(wanted.rows) if wanted.grad_accum == AUTO else [default_cut(wanted).rows]
    only_scanned = wanted.model.sizes.kind.bidirectional or wanted.model.sizes.kind.pair  # whose gradient is the scan's
    remats = [wanted.remat] if wanted.remat != AUTO else ["block"] if only_scanned else list(REMATS)
    if "selective" in remats and wanted.remat == AUTO and wanted.model.is_chunked(wanted.T):
        remats.remove("selective")  # in chunks nothing more is kept than with "block"
    found = [Cut(number, remat) for number in rows for remat in remats]
    return sorted(found, key=lambda cut: (step_seconds(wanted, cut), temporary_bytes(wanted, cut)))


def step_seconds(wanted: ToCut, cut: Cut) -> float:
    """What the cut makes of a step's time, by the rates above."""
    model = wanted.model
    weights, passes = linear_weights(model.sizes), PASSES[cut.remat]
    quantized = model.quant.format != "none"
    micro = model.sizes.L * LAUNCHES + quantized * passes * weights * DEQUANTIZE
    met = weights * active_share(model.sizes, model.sizes.weights)
    token = passes * met * MULTIPLY + model.sizes.L * model.sizes.D * ELEMENTWISE
    moved = 2 * kept_bytes(model.sizes, "block", wanted.rows, model.part(wanted.T), model.itemsize)
    bus = moved / BUS_BYTES_PER_SECOND if cut.remat == "block+offload" else 0.0
    return wanted.rows / cut.rows * micro + wanted.rows * model.part(wanted.T) * token + bus


def attention_of(model: ModelSpec, T: int) -> str:
    """The implementation that rows of T tokens take, on the GPU that programs are traced for."""
    if model.sizes.kind.bidirectional or model.sizes.kind.pair:
        return "xla"
    if model.is_chunked(T):
        return "chunked"
    if model.sequence > 1:  # no kernel takes queries from another place on than the first
        return chosen(model.attention, T)
    return chosen(model.attention, T, model.sizes.N, model.sizes.H, model.compute_dtype)


def unasked(wanted: ToCut) -> ToCut:
    """For a process that must not ask which device it has, since that starts JAX on it: attention as on any device."""
    return wanted._replace(model=dataclasses.replace(wanted.model, attention=chosen(wanted.model.attention, wanted.T)))


def log_sums(model: ModelSpec, T: int) -> int:
    """Float32 numbers that attention keeps of each token for its gradient."""
    return model.sizes.N if attention_of(model, T) == "flash" else 0


def temporary_bytes(wanted: ToCut, cut: Cut, members: int = 1) -> int:
    """Device bytes of a gradient's program beside its arguments and results.

    `members`: of a pack whose members compute side by side.
    """
    model, config = wanted.model, wanted.model.sizes
    itemsize = model.itemsize
    mine = model.part(wanted.T)
    T = chunk_size(mine, model.sequence_chunk) if model.is_chunked(wanted.T) else mine
    kept = kept_bytes(config, cut.remat, cut.rows, mine, itemsize, model.low_rank, log_sums(model, wanted.T))
    kept = int(kept * model.kept_share(wanted.T))
    if cut.remat == "block+offload":
        kept = 3 * kept // config.L  # on their way
    rows = cut.rows * T
    of_D, of_F = KEEPS_F_WIDTHS if cut.remat == "selective" else WIDTHS
    layer = (of_D * config.D + of_F * config.F) * rows * itemsize
    if model.quant.format == int8.FORMAT:  # the sums of gate and up in int32 and float32, before they are 16-bit
        layer += 2 * config.F * rows * INT8_SUM
    if attention_of(model, wanted.T) == "xla":
        layer += SCORE * config.N * mine * wanted.T * cut.rows
    if model.sequence > 1:  # keys and values of all tokens, and their gradients' sums in float32
        layer += 2 * config.K * config.H * (wanted.T - mine) * cut.rows * (2 * itemsize + 4)
    if cut.remat == "none":
        layer *= config.L
    logits = LOGIT * min(wanted.loss_chunk, cut.rows * mine) * config.V
    largest = max(map(math.prod, config.linears.values()))
    return members * (kept + max(layer, logits)) + largest * itemsize
