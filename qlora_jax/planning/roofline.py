"""The least time of a train step: its floating-point operations and its bytes over a GPU's rates.

Operations of one token, with P weights in linear layers, r the adapters' parameters (of a mixture's experts those that
a token meets), H = V * D of the head:

    base      2 P  forward, 2 P recomputed, 2 P for dx               (no gradient of frozen weights; nothing is
                   recomputed where remat is "none" or "selective")
    adapters  2 r  forward, 2 r recomputed, 4 r for dx, dA and dB
    head      2 H  forward, 2 H for dx; 2 H recomputed where remat is "none" (elsewhere both are done at once)
    head      2 H  more where it trains
    attention 4 N H_head T / 2 a layer forward and recomputed, twice that for its gradient (causal: half the square);
              where devices divide a row's tokens (mesh.sequence), that of the last one, whose tokens see most

Of an encoder-decoder a token of the prompt meets the encoder and the projections of what it gives, one of the answer
the others and the head; both count as wide as they may be. Attention is counted as a decoder's of the whole row.

Bytes of one micro-batch: packed codes and scales for each pass over the base (of a mesh that keeps experts where they
are, a device's own); where XLA dequantizes, also a 16-bit weight written and read again in each pass; what is kept of
the layers written and read; the head once a pass. Of a step: the paged state over the bus, both ways.
"""

import dataclasses
from collections.abc import Callable

from qlora_jax.lora import rank_one_parameters
from qlora_jax.models.sizes import active_share, share_with
from qlora_jax.planning.gpus import PlannedGpu
from qlora_jax.train.backward import kept_bytes
from qlora_jax.train.spec import RunSpec

PASSES = 3  # over the base: forward, recomputed, dx
BUS_BYTES_PER_SECOND = 25e9  # PCIe 4.0 x16, one direction, as large copies from pinned memory reach it


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Of one optimizer step."""

    flops: float
    bytes: float  # of device memory
    bus_bytes: float  # each way, between host and device
    seconds: float
    wire_bytes: int = 0  # that each of several devices receives from the others


def step_flops(spec: RunSpec, linear_weights: float, adapter_params: float, recomputed: bool = True) -> float:
    """Floating-point operations of one optimizer step.

    Args:
      linear_weights, adapter_params: P and r above.
      recomputed: also those that are done again to save memory (hardware FLOPs). Without them (model FLOPs) a token
        takes 4 P + 6 r + 4 H, and attention three times its forward.
    """
    sizes, batch = spec.model.sizes, spec.batch
    passes = PASSES if recomputed and _recomputes(spec) else PASSES - 1
    head_passes = PASSES if recomputed and spec.model.remat == "none" else PASSES - 1
    head_passes += "lm_head" in spec.model.lora.modules_to_save
    # of an encoder it is of rows, not of tokens
    head = 0.0 if sizes.kind.bidirectional else 2.0 * head_passes * sizes.V * sizes.D
    ways = spec.model.sequence
    attention = 2 * sizes.N * sizes.H * batch.T * sizes.L * (2 - 1 / ways)
    linear_weights *= active_share(sizes, sizes.weights) * _share_of_row(spec, sizes.weights)
    ranks = lambda name: rank_one_parameters(sizes, name)  # noqa: E731
    adapter_params *= active_share(sizes, ranks) * _share_of_row(spec, ranks)
    head *= _widths(spec)[1]
    token = 2 * passes * linear_weights + 2 * (passes + 1) * adapter_params + head + (passes + 1) * attention
    return token * batch.tokens / ways


def _widths(spec: RunSpec) -> tuple[float, float]:
    """The shares of a row that its prompt and its answer may take, where they go through stacks of their own."""
    if spec.model.sizes.kind.pair is None:
        return 1.0, 1.0
    T, model = spec.batch.T, spec.model
    return min(model.source_len or T, T) / T, min(model.target_len or T, T) / T


def _share_of_row(spec: RunSpec, size: Callable[[str], float]) -> float:
    """The share of a row's tokens that go through linear layers, by the size of each: of an encoder-decoder a prompt's
    through the encoder and the keys and values that the decoder takes of it, an answer's through the others."""
    sizes, (source, target) = spec.model.sizes, _widths(spec)
    if sizes.kind.pair is None:
        return 1.0
    reads = {name: name.startswith("encoder.") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
             for name in sizes.linears}  # fmt: skip
    passed = sum(size(name) * (source if reads[name] else target) for name in sizes.linears)
    return passed / sum(map(size, sizes.linears))


def _recomputes(spec: RunSpec) -> bool:
    return spec.model.remat in ("block", "block+offload")


def roofline(
    spec: RunSpec,
    gpu: PlannedGpu,
    packed_bytes: int,
    linear_weights: int,
    adapter_params: int,
    bus_bytes: int,
    wire_bytes: int = 0,
) -> Roofline:
    """The larger of computing and moving for each micro-batch, and the time of bus and wire beside it."""
    sizes, batch = spec.model.sizes, spec.batch
    passes = PASSES if _recomputes(spec) else PASSES - 1
    head = 0 if sizes.kind.bidirectional else sizes.V * sizes.D
    micro_flops = step_flops(spec, linear_weights, adapter_params) / batch.G
    here = share_with(1 / spec.axes.expert, sizes, sizes.weights)  # experts of other devices are read by those
    moved = here * passes * packed_bytes + 2 * PASSES * head
    kept = kept_bytes(sizes, spec.model.remat, batch.B, spec.model.part(batch.T), 2)
    moved += 2 * kept * spec.model.kept_share(batch.T)
    if spec.model.kernel in ("auto", "xla", "scratch") and spec.model.quant.format != "none":
        moved += here * passes * 4 * linear_weights
    micro = max(micro_flops / gpu.flops_per_second, moved / gpu.bytes_per_second)
    matrices = min(len(spec.model.lora.modules_to_save), 1 if sizes.tied else 2)
    seconds = batch.G * micro + 24 * (adapter_params + matrices * head) / gpu.bytes_per_second
    seconds = max(seconds, bus_bytes / BUS_BYTES_PER_SECOND, wire_bytes / gpu.link_bytes_per_second)
    return Roofline(batch.G * micro_flops, batch.G * moved, bus_bytes, seconds, wire_bytes)
