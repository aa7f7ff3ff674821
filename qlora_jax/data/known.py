"""Data sets known by name: where the hub has them, their format, and lengths that they are often cut at.

`data.path=NAME` reads a set from the hub; `data.format` is the config's, and configs/ has a file for each set of the
paper. No run takes lengths from here: its rows are whole, or as long as its config says. Plans and grids of a set that
is not on the machine need lengths beforehand.
"""

import dataclasses

from qlora_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class KnownSet:
    """`paths`: hub data sets, read one after the other. Lengths in tokens, as data.max_source_len and max_target_len:
    OASST1's and Alpaca's are the paper's, the others are like them."""

    paths: tuple[str, ...]
    format: str
    max_source_len: int
    max_target_len: int
    owner: str = ""  # where the files are to be had when the hub has none

    def names(self, name: str) -> tuple[str, ...]:
        """The hub data sets. Raises InputError when the hub has none."""
        if not self.paths:
            raise InputError(f"data set {name} is not on the hub in its owners' form: {self.owner}")
        return self.paths


_HH = tuple(
    f"Anthropic/hh-rlhf:{part}/train.jsonl.gz"
    for part in ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
)

KNOWN_SETS: dict[str, KnownSet] = {
    "oasst1": KnownSet(("timdettmers/openassistant-guanaco",), "oasst1", 16, 512),
    "hh-rlhf": KnownSet(_HH, "hh-rlhf", 16, 768),
    "alpaca": KnownSet(("tatsu-lab/alpaca",), "alpaca", 384, 128),
    "alpaca-clean": KnownSet(("yahma/alpaca-cleaned",), "alpaca", 384, 128),
    "self-instruct": KnownSet(
        (),
        "self-instruct",
        384,
        128,
        "give data/finetuning/self_instruct_221203/gpt3_finetuning_data.jsonl of github.com/yizhongw/self-instruct "
        "(yizhongw/self_instruct on the hub is a program that fetches it)",
    ),
    "unnatural-instructions": KnownSet(("mrm8488/unnatural-instructions-core",), "unnatural-instructions", 384, 128),
    "flan-v2": KnownSet(
        (), "flan-v2", 384, 256, "give the .tsv files of flan/v2/cot_data in github.com/google-research/FLAN"
    ),
    "chip2": KnownSet(("laion/OIG:unified_chip2.jsonl",), "chip2", 384, 128),
    "longform": KnownSet(("akoksal/LongForm",), "longform", 512, 1024),
    "dolly": KnownSet(("databricks/databricks-dolly-15k",), "dolly", 768, 512),
}
