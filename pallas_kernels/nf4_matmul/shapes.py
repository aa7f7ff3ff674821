"""Named shapes of the linear layers that carry 4-bit weights, for benchmarks, tuning and tests.

Sources: config.json of each model on the hub. Layers of one model that share a shape are listed once.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """A weight [O, I]: out-features, in-features."""

    out_features: int
    in_features: int


# model: D model width, F feed-forward width, K * H width of all key/value heads
_WIDTHS = {
    "tinyllama-1b": (2048, 5632, 256),
    "llama-3-8b": (4096, 14336, 1024),
    "llama-7b": (4096, 11008, 4096),
    "llama-13b": (5120, 13824, 5120),
    "llama-33b": (6656, 17920, 6656),
    "llama-65b": (8192, 22016, 8192),
    "llama-70b": (8192, 28672, 1024),
}


def _layers(model_width: int, feed_forward: int, key_value: int) -> dict[str, Shape]:
    layers = {"attention": Shape(model_width, model_width)}  # q_proj and o_proj; all four where k and v are as wide
    if key_value != model_width:
        layers["key_value"] = Shape(key_value, model_width)  # k_proj and v_proj
    layers["gate_up"] = Shape(feed_forward, model_width)
    layers["down"] = Shape(model_width, feed_forward)
    return layers


MODELS = {model: _layers(*widths) for model, widths in _WIDTHS.items()}
# "llama-7b/down" -> Shape(4096, 11008)
SHAPES = {f"{model}/{layer}": shape for model, layers in MODELS.items() for layer, shape in layers.items()}
