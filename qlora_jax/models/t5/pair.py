"""What an encoder-decoder has where a decoder alone has a Kind's parts: two stacks of layers, and their names on disk.

A linear layer is called by its stack and by its place in a layer, "decoder.layer.1.EncDecAttention.q", which on disk is
"decoder.block.3.layer.1.EncDecAttention.q" in the fourth layer.
"""

import dataclasses
import re
from collections.abc import Collection

SELF_OF_ENCODER, FED_OF_ENCODER = "encoder.layer.0.SelfAttention", "encoder.layer.1.DenseReluDense"
SELF_OF_DECODER, CROSS = "decoder.layer.0.SelfAttention", "decoder.layer.1.EncDecAttention"
FED_OF_DECODER = "decoder.layer.2.DenseReluDense"


@dataclasses.dataclass(frozen=True)
class Pair:
    """The description of an encoder and a decoder with relative positions (T5, mT5)."""

    encoder_layers: int
    decoder_layers: int
    buckets: int  # of distances, which share a bias
    max_distance: int  # tokens; all that is farther is in the last bucket
    gated: bool  # the feed-forward is activation(wi_0 x) * wi_1 x, not activation(wi x)
    pad_id: int
    start_id: int  # what the decoder is given before its first token

    @property
    def rows_into(self) -> tuple[str, ...]:
        """Names of the feed-forward's layers that take x."""
        return ("wi_0", "wi_1") if self.gated else ("wi",)

    def linears(self, D: int, F: int, NH: int) -> dict[str, tuple[int, int]]:
        """Name of a linear layer -> [O, I], in the order in which they compute."""
        attention = {"q": (NH, D), "k": (NH, D), "v": (NH, D), "o": (D, NH)}
        fed = {name: (F, D) for name in self.rows_into} | {"wo": (D, F)}
        parts = {SELF_OF_ENCODER: attention, FED_OF_ENCODER: fed}
        parts |= {SELF_OF_DECODER: attention, CROSS: attention, FED_OF_DECODER: fed}
        return {f"{part}.{name}": shape for part, shapes in parts.items() for name, shape in shapes.items()}

    @property
    def norms(self) -> list[str]:
        """Names of the norms of layers: each stands before what its number names."""
        return [f"{part.rpartition('.')[0]}.layer_norm" for part in self.parts]

    @property
    def parts(self) -> tuple[str, ...]:
        return SELF_OF_ENCODER, FED_OF_ENCODER, SELF_OF_DECODER, CROSS, FED_OF_DECODER

    def outer(self, V: int, D: int, N: int, tied: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
        """As ModelConfig.outer: the stacks' last norms and biases of distances too."""
        bias = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "embedding": ("shared.weight", (V, D)),
            "encoder_norm": ("encoder.final_layer_norm.weight", (D,)),
            "norm": ("decoder.final_layer_norm.weight", (D,)),
            "encoder_distances": (bias.format("encoder"), (self.buckets, N)),
            "decoder_distances": (bias.format("decoder"), (self.buckets, N)),
        }
        return found if tied else found | {"head": ("lm_head.weight", (V, D))}

    def depth(self, name: str) -> int:
        """Layers of the stack that a part belongs to."""
        return self.encoder_layers if name.startswith("encoder.") else self.decoder_layers

    @staticmethod
    def module(index: int, name: str) -> str:
        """(3, "decoder.layer.1.EncDecAttention.q") -> "decoder.block.3.layer.1.EncDecAttention.q"."""
        stack, _, rest = name.partition(".")
        return f"{stack}.block.{index}.{rest}"

    @staticmethod
    def target_modules(names: Collection[str], linears: Collection[str]) -> list[str] | str:
        """What picks these linear layers in PEFT: their last names, or an expression where that would pick others."""
        ends = {name.rpartition(".")[2] for name in names}
        if all(name in names for name in linears if name.rpartition(".")[2] in ends):
            return sorted(ends)
        stacks = [name.partition(".")[::2] for name in sorted(names)]
        return rf"({'|'.join(rf'{stack}\.block\.\d+\.{re.escape(rest)}' for stack, rest in stacks)})"
