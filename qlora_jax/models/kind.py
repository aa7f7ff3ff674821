"""What one family of decoders does otherwise than another: a description, and the defaults are Llama's.

The decoder (block.py, decoder.py) is written once, over roles: "q" is whatever projects queries, and here stands what
it is called on disk. The files of families/ make a Kind of a config.json.
"""

import dataclasses
from functools import cached_property

from qlora_jax.models.t5.pair import Pair

Pairs = tuple[tuple[str, str], ...]  # role -> name in a layer, as Hugging Face names it


def names(**by_role: str) -> Pairs:
    """names(q="self_attn.q_proj", ...): what a layer's parts are called; "" or None leaves a role out."""
    return tuple((role, name) for role, name in by_role.items() if name)


# Role of a linear layer -> letters of its weight [O, I], in ModelConfig's letters: QKV is NH + 2 KH, 2F is 2 F.
LINEAR_ROLES: dict[str, tuple[str, str]] = {
    "q": ("NH", "D"),
    "k": ("KH", "D"),
    "v": ("KH", "D"),
    "qkv": ("QKV", "D"),
    "o": ("D", "NH"),
    "gate": ("F", "D"),
    "up": ("F", "D"),
    "gate_up": ("2F", "D"),
    "down": ("D", "F"),
}
# Where a norm may stand, in the order of a layer: on what attention and feed-forward take and give ("in", "out"), after
# what they give was added ("end"), and on queries and keys.
NORM_ROLES = (
    "attention_in", "q_norm", "k_norm", "attention_out", "attention_end",
    "feed_forward_in", "feed_forward_out", "feed_forward_end",
)  # fmt: skip

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "relu2")  # as ACT2FN

OWN_ROPE, LOCAL_ROPE, NO_ROPE = 0, 1, 2  # what Kind.layer_ropes names


@dataclasses.dataclass(frozen=True)
class Experts:
    """The feed-forward of a mixture: E experts, of which each token takes a few (experts.py, router.py).

    A linear layer whose name begins with `stem` is one of each expert: "mlp.experts.up_proj" is the stack of all,
    "mlp.experts.3.up_proj" what Hugging Face calls the fourth.
    """

    count: int  # E
    per_token: int  # experts that a token takes
    stem: str = "mlp.experts"
    router: str = "mlp.gate"
    router_bias: bool = False
    normalized: bool = False  # the weights of a token's experts sum to one
    chosen_alone: bool = False  # the softmax is over a token's experts, not over all
    fused: Pairs = ()  # names of stacks that later files fuse into one -> that file's name, in the order of its rows
    fused_alone: bool = False  # those files are the only ones: no expert's weight has a key of its own
    swiglu: tuple[float, float] | None = None  # (alpha, limit): gate and up are clamped, and lie side by side
    stored: str = ""  # the 4-bit format that experts have on disk and keep, whatever the other weights are stored as


@dataclasses.dataclass(frozen=True)
class Bidirectional:
    """What an encoder has that no decoder has (models/roberta): each token sees all tokens of its row, before and
    after it, and of the row's first a head makes classes, or one number."""

    pad_id: int  # the token that has no position of its own
    token_types: str  # name of the table whose first row is added to every token
    types: int  # rows of that table
    init_std: float  # standard deviation of a fresh head's weights
    labels: int = 0  # classes of the head in the checkpoint, 1: a number; 0: it has none
    head: str = "classifier"  # name of the head


@dataclasses.dataclass(frozen=True)
class Kind:
    """The description. Numbers of a model stand here only where most families have none of them."""

    # names on disk
    layer: str = "model.layers.{}"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"  # "": none
    head: str = "lm_head"
    positions: str = ""  # learned ones; "": none
    embedding_norm: str = ""
    project_in: str = ""  # from an embedding of another width than D, and back before the head; "": none
    project_out: str = ""
    linears: Pairs = names(
        q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj",
        gate="mlp.gate_proj", up="mlp.up_proj", down="mlp.down_proj",
    )  # fmt: skip
    norms: Pairs = names(attention_in="input_layernorm", feed_forward_in="post_attention_layernorm")
    buffers: tuple[str, ...] = ()  # ends of keys that old checkpoints carry and that follow from config.json
    optional_prefix: str = ""  # of all keys but the head's; old checkpoints were written without it
    renamed: Pairs = ()  # beginnings of keys that other versions of transformers write -> those of this table
    beside: tuple[str, ...] = ()  # beginnings of keys of other parts of the model, which are copied and never computed
    transposed: bool = False  # linear weights lie [I, O] on disk (transformers' Conv1D)
    task: str = "CAUSAL_LM"  # what PEFT calls what the model does

    # an encoder beside the decoder, which this file then describes in part (models/t5); None: a decoder alone
    pair: Pair | None = None

    # parts
    biased: tuple[str, ...] = ()  # roles of the linear layers that add one
    head_bias: bool = False
    norm: str = "rms"  # "rms" or "layer"; "rms+1", "layer+1": times 1 + w
    norm_bias: bool = False
    # one of [H] for "head", of all heads at once for "whole", one [N, H] a head for "heads"; "heads apart": as "heads",
    # in files a module for each head (NAME.norms.3), without biases
    qk_norm: str = "head"
    turned_first: bool = False  # queries and keys are normed once they are turned
    qkv_layout: str = "blocks"  # of a fused projection: q, k, v one after the other; "groups": queries, k, v of each K
    activation: str = "silu"
    normed_residual: bool = False  # what is added to is the norm's output, not what it was given
    parallel: bool = False  # x + attention(norm x) + feed_forward(norm x)
    experts: Experts | None = None  # None: one feed-forward for all tokens
    clip_qkv: float = 0.0  # queries, keys and values are clipped to +- this; 0: not
    sinks: str = ""  # name of the attention sinks, one a head; "": none

    # positions
    rotary: str = "half"  # pairs (h, h + H / 2); "pairs": (2 h, 2 h + 1); "": none
    rotary_width: int = 0  # of a head, from its first; 0 is all of H
    position_offset: int = 0  # first row of the learned positions that a token takes
    alibi: bool = False
    local_rope: tuple[float, tuple] = (10000.0, ())  # theta and scaling of layers with LOCAL_ROPE
    layer_ropes: tuple[int, ...] = ()  # OWN_ROPE, LOCAL_ROPE or NO_ROPE for each layer; (): OWN_ROPE in all
    windows: tuple[int, ...] = ()  # tokens that each layer sees, itself among them; 0: all; (): all in all layers

    # numbers
    softcap: float = 0.0  # of attention scores s: cap * tanh(s / cap); 0: none
    logit_softcap: float = 0.0
    attention_scale: float | None = None  # None: 1 / sqrt(H)
    scores_fall: bool = False  # scores are divided by the layer's number, from 1 on
    query_growth: tuple[float, float] = (0.0, 1.0)  # (b, c): queries times 1 + b log(1 + floor(position / c))
    embedding_width: int = 0  # 0 is D
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and feed-forward add
    logit_scale: float = 1.0

    bidirectional: Bidirectional | None = None  # None: a decoder

    @cached_property
    def linear(self) -> dict[str, str]:
        """Role -> name of the linear layers."""
        return dict(self.linears)

    @cached_property
    def norm_of(self) -> dict[str, str]:
        """Role -> name of the norms. Two roles may share one."""
        return dict(self.norms)

    def module(self, index: int, name: str) -> str:
        """(3, "self_attn.q_proj") -> "model.layers.3.self_attn.q_proj", as Hugging Face calls it."""
        return f"{self.layer.format(index)}.{name}" if self.pair is None else self.pair.module(index, name)

    def is_expert(self, name: str) -> bool:
        """Whether a linear layer is one of each expert."""
        return self.experts is not None and name.startswith(f"{self.experts.stem}.")

    def units(self, name: str) -> list[str]:
        """What Hugging Face calls a linear layer within a layer: its name, or one for each expert."""
        if self.experts is None or not self.is_expert(name):
            return [name]
        stem = self.experts.stem
        return [f"{stem}.{e}{name.removeprefix(stem)}" for e in range(self.experts.count)]

    @property
    def plain_embedding(self) -> bool:
        """Whether a token's row of the embedding enters the first layer as it is."""
        others = self.positions or self.embedding_norm or self.project_in
        return self.embedding_scale == 1 and not others

    @property
    def layers_differ(self) -> bool:
        """Whether a layer is told what it is (its window, its rope)."""
        return len(set(self.windows)) > 1 or len(set(self.layer_ropes)) > 1


LLAMA = Kind()
