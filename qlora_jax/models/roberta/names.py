"""What an encoder's tables and head are called on disk, and their shapes."""

from qlora_jax.models.kind import Bidirectional


def head_shapes(kind: Bidirectional, D: int, labels: int) -> dict[str, tuple[int, ...]]:
    """The head's arrays: key on disk ("classifier.dense.weight") -> shape. As RobertaClassificationHead's."""
    return {
        f"{kind.head}.dense.weight": (D, D),
        f"{kind.head}.dense.bias": (D,),
        f"{kind.head}.out_proj.weight": (labels, D),
        f"{kind.head}.out_proj.bias": (labels,),
    }


def head_outer(kind: Bidirectional, D: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What ModelConfig.outer has of an encoder besides: the token types, and the head of a checkpoint that has one."""
    found: dict[str, tuple[str, tuple[int, ...]]]
    found = {"token_types": (f"{kind.token_types}.weight", (kind.types, D))}
    if kind.labels:
        found |= {key: (key, shape) for key, shape in head_shapes(kind, D, kind.labels).items()}
    return found
