"""What one process of a run fails of, all of them say and end with; else the others would wait for it.

Who fails writes its line into the store of JAX's coordination service, which the first process holds. A thread of each
process looks for such a line, says it and ends the process, wherever that is: in a barrier, or in an exchange between
devices, which nothing else would end. The first process stays until all have heard.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax

from qlora_jax.errors import InputError, one_line

_FAILED, _HEARD = "qlora_jax/failed", "qlora_jax/heard/{}"
_OFTEN = 0.5  # s
_PATIENCE = 10  # s that the first process stays for those that have not heard, and that settling may take
_SOON = 2  # s in which the line of one that failed comes before what its end breaks
_ending = threading.Lock()  # of the thread that ends this process
_before_end: list[Callable[[], None]] = []


def watch() -> None:
    """Ends this process when another says that it failed."""
    over = threading.Event()
    looking = threading.Thread(target=_watch, args=(over,), name="failures", daemon=True)
    looking.start()

    def stop() -> None:
        over.set()
        looking.join()

    atexit.register(stop)  # a thread that is inside of a call while the interpreter goes aborts the process


def _watch(over: threading.Event) -> None:
    while not over.wait(_OFTEN):
        try:
            found = _client().key_value_dir_get(_FAILED)
        except Exception:  # the first process is gone, which ends this one otherwise
            return
        for _, said in found:
            status, line = json.loads(said)
            end(line, status)


@contextlib.contextmanager
def before_end(settle: Callable[[], None]) -> Iterator[None]:
    """`settle` is called where this process is ended in the block."""
    _before_end.append(settle)
    try:
        yield
    finally:
        _before_end.remove(settle)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """What is raised in the block ends this process, and all others with the same line."""
    try:
        yield
    except InputError as error:
        _tell(f"error: {one_line(str(error))}", 2)
    except Exception as error:
        if is_of_others(error):
            end_lost(error)
        traceback.print_exc()
        what = (str(error).splitlines() or [""])[0][:200]
        _tell(f"error: process {jax.process_index()} of this run ended by a {type(error).__name__}: {what}", 1)


def _tell(line: str, status: int) -> None:
    with contextlib.suppress(Exception):  # another was first, or the first process is gone
        _client().key_value_set(f"{_FAILED}/line", json.dumps([status, line]))
    end(line, status)


def end(line: str, status: int) -> None:
    """Says the line and ends this process."""
    if not _ending.acquire(blocking=False):
        threading.Event().wait()  # for the thread that ends it
    print(line, file=sys.stderr, flush=True)
    settling = threading.Thread(target=_settle, daemon=True)
    settling.start()
    settling.join(_PATIENCE)
    with contextlib.suppress(Exception):
        client, index = _client(), jax.process_index()
        client.key_value_set(_HEARD.format(index), "")
        for other in range(1, jax.process_count() if index == 0 else 0):
            client.blocking_key_value_get(_HEARD.format(other), 1000 * _PATIENCE)
    sys.stdout.flush()
    os._exit(status)


def _settle() -> None:
    for settle in reversed(_before_end):
        with contextlib.suppress(Exception):
            settle()


def end_lost(error: Exception) -> None:
    """Ends this process for another that is gone; by that one's own line, if it said one."""
    threading.Event().wait(_SOON)
    what = (str(error).splitlines() or [type(error).__name__])[0][:200]
    end(lost(what), 1)


def lost(what: str) -> str:
    """The line of a process that lost another."""
    return (
        f"error: another process of this run ended or cannot be reached ({what}): start all of them again, they go on "
        "from the newest whole checkpoint"
    )


def is_of_others(error: Exception) -> bool:
    """Whether an error is one of reaching other processes."""
    words = ("gloo", "connection", "peer", "nccl", "coordination", "heartbeat", "barrier")
    # gloo's failures come as ValueError; what cannot be reached beside the devices (a hub, a logger) as OSError
    kinds, text = (jax.errors.JaxRuntimeError, ValueError), str(error).lower()
    return isinstance(error, kinds) and any(word in text for word in words)


def _client() -> Any:
    from jax._src import distributed  # where orbax, too, takes it from

    return distributed.global_state.client
