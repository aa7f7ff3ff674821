"""Where every config starts: the library's own (qlora_jax/base.py), which has every key with its unit.

A config changes what its experiment needs: c = base.get_config(), then c.lora.rank = 16, and so on.
"""

from qlora_jax.base import get_config

__all__ = ["get_config"]
