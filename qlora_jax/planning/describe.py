"""A plan as a person reads it."""

import math

import jax

from qlora_jax.mesh.rules import Cut, named
from qlora_jax.planning.memory import usable_bytes
from qlora_jax.planning.plan import EFFICIENCIES, Plan
from qlora_jax.train.cut import in_words
from qlora_jax.train.shapes import abstract_model

_LABELS = {
    "codes": "base: codes",
    "scales": "base: scales",
    "linear_16bit": "base: linear layers, not quantized",
    "embeddings_and_head": "base: embeddings and head",
    "norms": "base: norms, biases, positions",
    "adapters": "adapters",
    "modules_to_save": "embedding and head that train",
    "gradients": "gradients",
    "optimizer": "optimizer state on the device",
    "block_inputs": "kept of the layers (remat)",
    "temporaries": "XLA's temporaries",
    "allocator": "ends of blocks, cuBLAS's workspace",
}


def table(plan: Plan) -> str:
    """The plan as a person reads it. GB is 10^9 bytes, GiB 2^30."""
    memory, batch, peak = plan.memory, plan.spec.batch, plan.memory.peak
    scale, unit = (1e9, "GB") if peak.total >= 1e9 else (1e6, "MB")

    def row(label: str, size: int, more: str = "") -> str:
        return f"  {label:<36}{size / scale:>9.3f} {unit}{more}"

    pages = f" in {len(memory.resident)} pages, {sum(memory.resident)} of them on the device"
    devices, parts = plan.spec.axes.devices, plan.spec.axes.row_parts
    lines = [f"{plan.gpu.device_kind}: {both(plan.gpu.memory_bytes)}", ""]
    if devices > 1:
        lines[0] = f"{devices} x {lines[0]} each; mesh: {plan.spec.axes}; what follows is of each"
    lines += [row(_LABELS[kind], size) for kind, size in peak.bytes.items()]
    lines += [
        row(f"peak on the device, while: {peak.name}", peak.total),
        "  " + ", ".join(f"{phase.name} {phase.total / scale:.3f}" for phase in memory.phases) + f" {unit}",
        row("of which a run may take", usable_bytes(plan.gpu)),
        "",
        row("pinned host memory", memory.pinned_host_bytes),
        row("host memory at the peak of loading", memory.load_host_peak_bytes),
        row("optimizer state", memory.optimizer_bytes, pages),
        "",
        f"  a step: {in_words(batch.G, batch.B)} of {batch.T}{_shared(plan)} = "
        f"{parts * batch.tokens:,} tokens, remat {plan.spec.model.remat}",
        f"  ({plan.choice.reason}),",
        f"  {plan.time.flops / 1e12:,.2f} TFLOP,",
        f"  {plan.time.bytes / 1e9:,.2f} GB of device memory moved, {plan.time.bus_bytes / 1e9:,.3f} GB each way over "
        "the bus",
        *_wire(plan),
        f"  roofline {plan.time.seconds:.3g} s; tokens/s at "
        + ", ".join(
            f"{share:.0%}: {share * parts * batch.tokens / plan.time.seconds:,.0f}" for share in EFFICIENCIES
        ),
        "",
    ]
    if plan.fits:
        room = usable_bytes(plan.gpu) - peak.total
        lines.append(f"it fits, with {both(room)} to spare")
    else:
        short, sparse = peak.total - usable_bytes(plan.gpu), plan.spec.model.sizes.sparse
        lines.append(f"it does not fit: {both(short)} short")
        if memory.held_bytes > usable_bytes(plan.gpu):
            lines.append(
                f"  base, adapters and gradients alone take {both(memory.held_bytes)}: take a larger card, a smaller "
                "model or a smaller lora.rank" + (", or lora.targets without the experts" if sparse else "")
            )
        lines += [f"  nor with {change}" for change in plan.tried]
        if plan.change is not None:
            lines.append(f"  it fits with {plan.change}")
    return "\n".join(lines)


def _shared(plan: Plan) -> str:
    """How devices divide a step's rows, behind how many each has and their length."""
    axes = plan.spec.axes
    tokens = f", {plan.spec.of_one().model.part(plan.spec.batch.T)} of each row" if axes.sequence > 1 else ""
    return f"{tokens} on each" if axes.row_parts * axes.sequence > 1 else ""


def _wire(plan: Plan) -> list[str]:
    """What each of several devices receives in a step."""
    if not plan.memory.wire:
        return []
    codes = sum(size for what, size in plan.memory.wire.items() if what.endswith(" u8"))
    total, rate = plan.time.wire_bytes, plan.gpu.link_bytes_per_second
    what = f"{codes / max(total, 1):.1%} of it packed weights" if codes else "activations and gradients"
    return [
        f"  {total / 1e9:,.2f} GB received from the other devices, {what}: "
        f"{total / rate:.3g} s at {rate / 1e9:,.0f} GB/s,"
    ]


def mesh_table(plan: Plan) -> str:
    """Each array of model and adapter: its shape, along what it is divided, and what each device holds."""
    model = abstract_model(plan.spec.model, plan.spec.axes)
    devices = plan.spec.axes
    of_tokens = ", and their tokens along sequence" * (devices.sequence > 1)
    rows = [f"mesh: {devices}; rows of a batch are divided along data, fsdp and expert{of_tokens}", ""]
    mine = model.of_one()
    parts = [*jax.tree.leaves(mine.base), *jax.tree.leaves(mine.adapter)]
    for (name, leaf), part in zip([*named(model.base), *named(model.adapter)], parts, strict=True):
        cut = Cut() if model.shards is None else model.shards.cuts.get(name, Cut())
        along = [[axis for axis in names if getattr(devices, axis) > 1] for names in cut.of_each(len(leaf.shape))]
        axes = ["+".join(names) or "-" for names in along]
        size = math.prod(part.shape) * part.dtype.itemsize
        shape = ", ".join(str(d) for d in leaf.shape)
        line = f"  {name:<56}{f'{leaf.dtype}[{shape}]':<36}({', '.join(axes)})"
        rows.append(f"{line:<112}{size / 1e6:>10.2f} MB")
    return "\n".join([*rows, "  optimizer state lies as the parameters that it is of", ""])


def both(size: int) -> str:
    """In GB and in GiB."""
    if size < 1e9:
        return f"{size / 1e6:.2f} MB ({size / 2**20:.2f} MiB)"
    return f"{size / 1e9:.2f} GB ({size / 2**30:.2f} GiB)"
