"""A fence around a reader: what it may touch while it reads a stranger's file, held by Python's audit events.

It may open files of the folder that it was given, and modules of the installed packages that are imported late. All
else is a breach: another file, a folder made or removed, a process, a socket, a pickle's class, an import of a module
that the folder names, code that is run and is neither a module of a package nor a chat template. A library's native
code raises no such events: it is handed names of files by Python code, which is fenced.
"""

import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

_LIBRARIES = tuple(
    str(Path(place).resolve()) + os.sep
    for place in {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sys.prefix, sys.base_prefix}
)
_TEMPLATES = ("<template>", "<unknown>")  # what Jinja calls the code of one
_CODE = (".py", ".pyc", ".so")
_REPOSITORY = str(Path(__file__).resolve().parents[2]) + os.sep
_PATHS = {  # events whose first arguments are paths -> how many are
    "os.listdir": 1, "os.scandir": 1, "os.mkdir": 1, "os.rmdir": 1, "os.remove": 1, "os.truncate": 1, "os.chmod": 1,
    "os.chown": 1, "os.utime": 1, "os.chdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "shutil.rmtree": 1,
    "shutil.copyfile": 2, "shutil.move": 2, "sqlite3.connect": 1,
}  # fmt: skip
_NEVER = (
    "pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty",
    "pty.spawn", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request",
    "ctypes.dlopen", "webbrowser.open", "code.__new__",
)  # fmt: skip


_up: "list[Fence]" = []  # the fence that stands: one hook asks it, for audit hooks stay with their process
_is_watched = False


class Fence:
    """`with fence:` around a reader; `breaches` has what it did that it may not. One stands at a time.

    folder: what may be opened; `write`: and changed.
    """

    def __init__(self, folder: Path, write: bool = False):
        global _is_watched
        self._folder = str(folder.resolve()) + os.sep
        self._write = write
        self._modules = {name.partition(".")[0] for name in sys.modules} | sys.stdlib_module_names
        self.breaches: list[str] = []
        if not _is_watched:
            sys.addaudithook(lambda event, args: _up[0]._see(event, args) if _up else None)
            _is_watched = True

    def __enter__(self) -> "Fence":
        self.breaches = []
        _up[:] = [self]
        return self

    def __exit__(self, *_: Any) -> None:
        _up.clear()

    def _see(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            self._look(event, args[0], bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)))
        elif event in _PATHS:
            for path in args[: _PATHS[event]]:
                self._look(event, path, event not in ("os.listdir", "os.scandir", "sqlite3.connect"))
        elif event == "import":
            if args[0].partition(".")[0] not in self._modules:
                self.breaches.append(f"import {args[0]}")
        elif event == "exec":
            name = args[0].co_filename
            if name not in _TEMPLATES and not name.startswith((*_LIBRARIES, _REPOSITORY, "<frozen")):
                self.breaches.append(f"code of {name} was run")
        elif event == "code.__new__" and args[1] in _TEMPLATES:
            return  # Jinja names a template's line in tracebacks
        elif event in _NEVER:
            self.breaches.append(f"{event} {args!r:.200}")

    def _look(self, event: str, path: Any, changes: bool) -> None:
        if isinstance(path, int) or path is None or (path in _TEMPLATES and not changes):
            return  # opened before; or Python looks for the line of a template that does not compile
        text = os.fsdecode(path).removeprefix("file:")
        whole = os.path.abspath(text.partition("?")[0]) + (os.sep if event in ("os.listdir", "os.scandir") else "")
        if (whole + os.sep).startswith(self._folder) and (self._write or not changes):
            if whole.endswith(_CODE):
                self.breaches.append(f"{event} {whole}: code in the folder")
            return
        is_code = whole.endswith(_CODE) or event in ("os.listdir", "os.scandir")
        if not changes and is_code and whole.startswith((*_LIBRARIES, _REPOSITORY)):
            return
        self.breaches.append(f"{event} {whole}{' to change it' if changes else ''}")
