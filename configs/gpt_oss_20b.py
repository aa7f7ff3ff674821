"""gpt-oss 20B, a mixture of 32 experts that stay in the MXFP4 of its files, on chats packed into 2,048 tokens a row."""

from ml_collections import ConfigDict

from configs import chat


def get_config() -> ConfigDict:
    c = chat.get_config()
    c.model.path = "openai/gpt-oss-20b"
    return c.lock()
