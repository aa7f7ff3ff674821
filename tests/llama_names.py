"""What Llama's parts are called on disk, for tests that look at one of them."""

from qlora_jax.models.kind import LINEAR_ROLES, LLAMA

LINEARS = {LLAMA.linear[role]: letters for role, letters in LINEAR_ROLES.items() if role in LLAMA.linear}
NORMS = tuple(LLAMA.norm_of.values())
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
LAYER = "model.layers.{}.{}.weight"
