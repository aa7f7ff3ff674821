"""A plan as a person reads it."""

from qlora_jax.planning.memory import usable_bytes
from qlora_jax.planning.plan import EFFICIENCIES, Plan
from qlora_jax.train.cut import in_words

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
    lines = [f"{plan.gpu.device_kind}: {both(plan.gpu.memory_bytes)}", ""]
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
        f"  a step: {in_words(batch.G, batch.B)} of {batch.T} = {batch.tokens:,} tokens, remat {plan.spec.model.remat}",
        f"  ({plan.choice.reason}),",
        f"  {plan.time.flops / 1e12:,.2f} TFLOP,",
        f"  {plan.time.bytes / 1e9:,.2f} GB of device memory moved, {plan.time.bus_bytes / 1e9:,.3f} GB each way over "
        "the bus",
        f"  roofline {plan.time.seconds:.3g} s; tokens/s at "
        + ", ".join(f"{share:.0%}: {share * batch.tokens / plan.time.seconds:,.0f}" for share in EFFICIENCIES),
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


def both(size: int) -> str:
    """In GB and in GiB."""
    if size < 1e9:
        return f"{size / 1e6:.2f} MB ({size / 2**20:.2f} MiB)"
    return f"{size / 1e9:.2f} GB ({size / 2**30:.2f} GiB)"
