"""A conversation, as chat templates take it."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation for a chat template.

    Attributes:
      messages: turns {"role": "system" | "user" | "assistant" | "tool", "content"}, and "tool_calls", "tool_call_id",
        "name", "reasoning_content" where the row has them. The last is the assistant's.
      tools: descriptions of functions that the assistant may call, or None.
      where: the place of its row.
      learn: for each message whether it is learned, where it is the assistant's; None: all are.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    where: str
    learn: tuple[bool, ...] | None = None
