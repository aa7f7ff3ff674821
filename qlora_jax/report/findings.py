"""What a factor's levels come to, in sentences: what was measured here, and what the paper found on the same axis."""

from collections.abc import Sequence

from qlora_jax.report.compare import Block, Pair, means, pairs
from qlora_jax.report.factors import Factor
from qlora_jax.report.names import figure_number, with_decimals

_TYPES = {"nf4", "fp4", "int4"}


def measured(block: Block, factor: int, higher: bool) -> list[str]:
    """The best level against the others; for a data type all that the paper orders."""
    of = block.factors[factor]
    labels, found = block.labels(factor), means(block, factor)
    if len(found) < 2:
        return []
    compared = pairs(block, factor, higher)
    order = sorted(range(len(found)), key=lambda level: found[level].mean, reverse=higher)
    first = order[0]
    against_first = {pair.b: pair for pair in compared if pair.a == first}
    lines = [f"{of.name}: the best mean is that of {labels[first]}, {figure_number(found[first].mean)}."]
    shown = order[1:] if len(order) <= 6 else [order[1], order[-1]]
    lines += [_against(of, labels, against_first[level]) for level in shown]
    if "quant.format" in of.shown:
        lines += [_against(of, labels, pair) for pair in compared if pair.a != first]
    return lines


def _against(of: Factor, labels: Sequence[str], pair: Pair) -> str:
    a, b, gap = labels[pair.a], labels[pair.b], pair.difference
    ends = (gap.low, gap.high) if gap.mean >= 0 else (-gap.high, -gap.low)
    middle, low, high = with_decimals([abs(gap.mean), *ends], gap.half)
    if gap.half is None:
        return f"{a} is ahead of {b} by {middle} with one seed: no interval, no conclusion."
    size = f"{middle} (95% interval {low} to {high}; ahead in {pair.a_better} of {gap.n} seeds)"
    if gap.is_clear:
        return f"{a} is better than {b} by {size}."
    return f"{a} and {b} are not told apart: the difference is {size}."


def paper(factor: Factor) -> list[str]:
    """The paper's findings on this axis, from larger models and other measures; nothing for an axis it has not."""
    formats = (
        {level[factor.shown.index("quant.format")] for level in factor.levels}
        if "quant.format" in factor.shown
        else set()
    )
    lines = []
    if len(formats & _TYPES) > 1:
        lines.append(
            "The paper found NF4 better than FP4 better than Int4 (perplexity on Pile Common Crawl, mean over OPT, "
            "BLOOM, LLaMA and Pythia of 125M to 13B: Int4 34.34, Float4 E2M1 31.07, NF4 + DQ 27.41)"
        )
    if {"nf4", "none"} <= formats:
        lines.append(
            "The paper found NF4 + DQ to match BF16 (5-shot MMLU of LLaMA 7B to 65B: BF16 53.0, NF4 + DQ 53.1)"
        )
    if "lora.rank" in factor.shown:
        lines.append("The paper found that r does not matter, once adapters are on all layers")
    if "lora.targets" in factor.shown:
        lines.append("The paper found that adapters on all layers matter")
    if "data.path" in factor.shown or "data.max_examples" in factor.shown:
        lines.append("The paper found the quality of a data set to matter more than its size")
    return [line + "." for line in lines]
