"""Draws docs/memory.svg: device memory of Guanaco 7B to 65B on a 48 GB card, by plan. Needs the extra `plan`.

    python scripts/draw_memory.py

Four plans are compiled, a minute or two in all. The figures are the least that training takes, one row a micro-batch:
`experiments.plan --config=FILE --gpu=a6000 --config.train.grad_accum=16 --config.model.remat=block`.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
MODELS = ("7b", "13b", "33b", "65b")
GPU = "a6000"
CARDS = {"24 GB: RTX 4090": 24, "48 GB: RTX A6000": 48}
# what a bar shows, from the left -> (kinds of bytes of a plan, colour)
PARTS = {
    "base in 4 bits": (("codes", "scales", "linear_16bit"), "#3b6ea8"),
    "embedding, head, norms": (("embeddings_and_head", "norms"), "#7aa6d6"),
    "adapters and their gradients": (("adapters", "gradients", "modules_to_save"), "#e08a3c"),
    "optimizer state on the device": (("optimizer",), "#c95f5f"),
    "activations and temporaries": (("block_inputs", "temporaries", "allocator"), "#9a9a9a"),
}


def main() -> None:
    from qlora_jax import plan

    keys = {"train.grad_accum": 16, "model.remat": "block"}
    plans = {
        name: plan(REPOSITORY / f"configs/guanaco_{name}.py", GPU, advise=False, say=print, **keys) for name in MODELS
    }
    draw({name: made.device_bytes for name, made in plans.items()}, REPOSITORY / "docs" / "memory.svg")


def draw(found: dict[str, dict[str, int]], out: Path) -> None:
    """A bar for each model. `found`: device bytes by kind, as a plan's `device_bytes`."""
    shown = {kind for kinds, _ in PARTS.values() for kind in kinds}
    unknown = {kind for kinds in found.values() for kind in kinds} - shown
    assert not unknown, f"kinds of memory that no part shows: {unknown}"
    matplotlib.rcParams["svg.hashsalt"] = "memory"  # the same file for the same figures
    figure, axes = plt.subplots(figsize=(8, 3.2))
    left = [0.0] * len(found)
    for part, (kinds, colour) in PARTS.items():
        sizes = [sum(device.get(kind, 0) for kind in kinds) / 1e9 for device in found.values()]
        if max(sizes) > 0:
            axes.barh(list(found), sizes, left=left, label=part, color=colour)
            left = [begin + size for begin, size in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over a card's line
        axes.text(total + 0.4, place, f"{total:.1f} GB", va="center", fontsize=9, bbox=white)
    for card, size in CARDS.items():
        axes.axvline(size * 2**30 / 1e9, color="black", linewidth=0.8, linestyle="--")
        axes.text(size * 2**30 / 1e9 - 0.3, -0.9, card, ha="right", va="center", fontsize=8)
    axes.set_ylim(len(found) - 0.4, -1.3)
    axes.set_xlim(0, 54)
    axes.set_yticks(range(len(found)), [f"Guanaco {name.upper()}" for name in found])
    axes.set_xlabel("GB on the GPU while it trains, by plan (16 x 1 rows of 576 tokens, r 64)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(0.9, 0.3))
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
