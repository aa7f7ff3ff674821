"""What each family of decoders is: its config.json as a Kind. A file has those that resemble each other.

description (what a family's entry says) → llamas, pairs (of a rope, side by side), mixtures (of experts), gemmas,
parallel (attention beside feed-forward), older (learned positions, ALiBi), roberta (encoders). encoders: models whose
decoder is one of these and has an encoder of images beside it. module: which module a kind is.
"""

from qlora_jax.models.families import gemmas, llamas, mixtures, older, pairs, parallel, roberta
from qlora_jax.models.families.description import Family

_ALL = (llamas, pairs, mixtures, gemmas, parallel, older, roberta)
FAMILIES: dict[str, Family] = {name: family for file in _ALL for name, family in file.FAMILIES.items()}
