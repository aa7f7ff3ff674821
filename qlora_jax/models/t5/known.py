"""Sizes of the T5s that people start from: hub name -> what its config.json says. Source: each model's config.json."""

from typing import Any

# width, feed-forward, layers of each stack, heads, head width
_SIZES = {
    "small": (512, 1024, 8, 6, 64),
    "base": (768, 2048, 12, 12, 64),
    "large": (1024, 2816, 24, 16, 64),
    "xl": (2048, 5120, 24, 32, 64),
    "xxl": (4096, 10240, 24, 64, 64),
}
_FIRST_SIZES = {
    "small": (512, 2048, 6, 8, 64),
    "base": (768, 3072, 12, 12, 64),
    "large": (1024, 4096, 24, 16, 64),
    "3b": (1024, 16384, 24, 32, 128),
    "11b": (1024, 65536, 24, 128, 128),
}


def _t5(width: int, feed_forward: int, layers: int, heads: int, head: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "d_model": width,
        "d_ff": feed_forward,
        "num_layers": layers,
        "num_heads": heads,
        "d_kv": head,
        "vocab_size": 32128,
        "decoder_start_token_id": 0,
        "is_encoder_decoder": True,
        **more,
    }


def _later(size: str) -> dict[str, Any]:
    return _t5(*_SIZES[size], feed_forward_proj="gated-gelu", tie_word_embeddings=False)


KNOWN_T5 = (
    {f"google/t5-v1_1-{size}": _later(size) for size in _SIZES}
    | {f"google/t5-{size}-lm-adapt": _later(size) for size in _SIZES}
    | {f"google/flan-t5-{size}": _later(size) for size in _SIZES}
    | {f"google-t5/t5-{size}": _t5(*sizes) for size, sizes in _FIRST_SIZES.items()}
)
