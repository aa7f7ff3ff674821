"""Text from a model: decoding with a KV cache, sampling, prompts and chat."""
