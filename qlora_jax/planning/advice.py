"""What would make a run fit: the smallest changes of its config, found by compiling them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from qlora_jax.train.spec import RunSpec


class Change(NamedTuple):
    """Keys of the config and their new values."""

    keys: dict[str, Any]

    def __str__(self) -> str:
        return " ".join(f"--config.{key}={value}" for key, value in self.keys.items())


def changes(spec: RunSpec, paging: str) -> Iterator[Change]:
    """What may be tried, least loss first: what changes no result, smaller micro-batches, shorter rows."""
    free: dict[str, Any] = {}
    if paging != "always":
        free["optimizer.paging"] = "always"
        yield Change(dict(free))
    if spec.model.remat != "block+offload":
        if spec.model.remat in ("none", "selective"):
            yield Change(free | {"model.remat": "block"})
        free["model.remat"] = "block+offload"
        yield Change(dict(free))
    B, G, T = spec.batch.B, spec.batch.G, spec.batch.T
    while B % 2 == 0:
        B, G = B // 2, G * 2
        free["train.grad_accum"] = G
        if spec.evaluation is not None:
            free["eval.batch_size"] = min(B, spec.evaluation.B)
        yield Change(dict(free))
    if spec.evaluation is not None and spec.evaluation.B > 1 and "eval.batch_size" not in free:
        free["eval.batch_size"] = 1
        yield Change(dict(free))
    while T >= 128:
        T //= 2
        yield Change(free | {"data.max_source_len": T // 2, "data.max_target_len": T // 2})


def first_that_fits(
    spec: RunSpec, paging: str, fits: Callable[[Change], bool], tries: int = 6
) -> tuple[Change | None, list[Change]]:
    """The first change of `changes` that fits, and those that were tried and do not."""
    tried: list[Change] = []
    for change in changes(spec, paging):
        if len(tried) == tries:
            break
        if fits(change):
            return change, tried
        tried.append(change)
    return None, tried
