"""The one exception for what a user can mend: bad files, bad config values, impossible requests."""

import errno
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

_MOST = 10_000  # letters of a message; what goes beyond is cut out of its middle
_UNSHOWN = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of surrogate pairs, separators of lines
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # turn the order of what follows


class InputError(ValueError):
    """What was found, what was expected and how to mend it, in one line. Commands print it and exit with status 2.

    It may quote a stranger's file, so what would end the line or steer a terminal stands there as \\n, \\x1b and so on.
    """

    def __init__(self, message: object = ""):
        super().__init__(one_line(str(message)))


@contextmanager
def full_disk_said() -> Iterator[None]:
    """Raises InputError where something inside cannot be written since the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = f" for {error.filename}" if error.filename else ""
        raise InputError(
            f"the disk has no room{what} ({error.strerror}); what was written before is whole: free space and run the "
            "same command again"
        ) from error


def one_line(text: str) -> str:
    """Text with an escape for each character that no line shows, and of bounded length."""
    if len(text) > _MOST:
        text = f"{text[: _MOST // 2]} ... ({len(text) - _MOST:,} letters left out) ... {text[-_MOST // 2 :]}"
    if text.isprintable():
        return text
    return "".join(_escape(letter) if _is_unshown(letter) else letter for letter in text)


def _is_unshown(letter: str) -> bool:
    return unicodedata.category(letter) in _UNSHOWN or letter in _TURNING


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()
