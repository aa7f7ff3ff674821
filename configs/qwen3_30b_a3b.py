"""Qwen 3 30B-A3B, a mixture of 128 experts, on chats in its own template, packed into rows of 2,048 tokens."""

from ml_collections import ConfigDict

from configs import chat


def get_config() -> ConfigDict:
    c = chat.get_config()
    c.model.path = "Qwen/Qwen3-30B-A3B"
    c.lora.rank = 8
    return c.lock()
