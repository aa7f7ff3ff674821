"""config.json of T5 (1.0, 1.1, Flan) and mT5."""

from typing import Any

from qlora_jax.models.kind import ACTIVATIONS, Kind
from qlora_jax.models.settings import MOST_LAYERS, Settings
from qlora_jax.models.t5.pair import Pair

# What transformers takes for absent keys.
_T5: dict[str, Any] = {
    "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu", "pad_token_id": 0, "eos_token_id": 1, "n_positions": 512,
}  # fmt: skip
_MT5 = _T5 | {
    "vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
DEFAULTS = {"T5ForConditionalGeneration": _T5, "MT5ForConditionalGeneration": _MT5}
# ends of keys that old checkpoints carry: copies of shared.weight, and a bias that nothing ever read
_UNREAD = ("coder.embed_tokens.weight", "EncDecAttention.relative_attention_bias.weight")


def read_t5(raw: dict, where: str, name: str) -> dict[str, Any]:
    """The fields of ModelConfig. `name`: the architecture, one of DEFAULTS.

    Raises InputError: a size is missing or nonsense.
    """
    c = Settings(raw, where, DEFAULTS[name])
    D, F, N, H, V = (c.count(key) for key in ("d_model", "d_ff", "num_heads", "d_kv", "vocab_size"))
    encoder_layers = decoder_layers = c.count("num_layers", most=MOST_LAYERS)
    if c.get("num_decoder_layers") is not None:
        decoder_layers = c.count("num_decoder_layers", most=MOST_LAYERS)
    activation, gated = _feed_forward(c)
    buckets, distance = (c.count(f"relative_attention_{key}") for key in ("num_buckets", "max_distance"))
    if buckets < 4 or buckets % 2 or distance <= buckets // 2:
        raise c.wrong("relative_attention_num_buckets", "an even number from 4, less than twice the max_distance")
    pad = _token(c, "pad_token_id")
    start = pad if c.get("decoder_start_token_id") is None else _token(c, "decoder_start_token_id")
    pair = Pair(encoder_layers, decoder_layers, buckets, distance, gated, pad, start)
    tied = raw.get("tie_word_embeddings") is not False
    scaled = raw.get("scale_decoder_outputs", tied) and name == "T5ForConditionalGeneration"
    kind = Kind(
        pair=pair,
        task="SEQ_2_SEQ_LM",
        embedding="shared",
        final_norm="decoder.final_layer_norm",
        linears=tuple((name, name) for name in pair.linears(D, F, N * H)),
        norms=tuple((name, name) for name in pair.norms),
        buffers=_UNREAD,
        activation=activation,
        attention_scale=1.0,
        logit_scale=D**-0.5 if scaled else 1.0,
    )
    eos = c.get("eos_token_id")
    return {
        "D": D, "F": F, "L": encoder_layers + decoder_layers, "N": N, "K": N, "H": H, "V": V,
        "context": 2 * c.count("n_positions"),  # a row has a prompt and an answer, and each has so many
        "norm_eps": c.positive("layer_norm_epsilon"), "rope_theta": 10000.0, "rope_scaling": (), "tied": tied,
        "eos_ids": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,), "bos_id": None, "kind": kind,
    }  # fmt: skip


def _feed_forward(c: Settings) -> tuple[str, bool]:
    """Activation, and whether there is a gate: "relu", "gated-gelu" (whose gelu is tanh's), "gated-silu", ..."""
    said = c.get("feed_forward_proj")
    parts = said.split("-") if isinstance(said, str) else []
    if len(parts) not in (1, 2) or (len(parts) == 2 and parts[0] != "gated") or parts[-1] not in ACTIVATIONS:
        raise c.wrong("feed_forward_proj", f"ACTIVATION or gated-ACTIVATION, of {', '.join(ACTIVATIONS)}")
    return "gelu_new" if said == "gated-gelu" else parts[-1], len(parts) == 2


def _token(c: Settings, key: str) -> int:
    value = c.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < c.count("vocab_size"):
        raise c.wrong(key, "a token's number below vocab_size")
    return value
