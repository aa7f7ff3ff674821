"""Config files: reading one, overriding its keys from a command line, and describing the result.

A config file is Python with a function `get_config() -> ml_collections.ConfigDict`. A key is named by its path, as in
"train.batch_size". Values given as text become what the file's value is: bool, int, float, str, or a tuple of these.
"""

import ast
import difflib
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qlora_jax.errors import InputError
from qlora_jax.settings import AUTO, GONE, NUMBERS_OR_AUTO, flatten, nearest

REPOSITORY = Path(__file__).resolve().parents[1]
_MISSING = object()
BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def load_config(path: str) -> ConfigDict:
    """Runs the file `path` and returns what its `get_config` returns, locked: no keys can be added.

    Raises:
      InputError: no such file, or a mistake in it, named with file and line.
    """
    config = call(path, "get_config", _MISSING)
    if config is _MISSING:
        raise InputError(f"config file {path}: no function get_config() that returns an ml_collections ConfigDict")
    if not isinstance(config, ConfigDict):
        found = type(config).__name__
        raise InputError(f"config file {path}: get_config() returns {found}, expected a ConfigDict of ml_collections")
    return config.lock()


def call(path: str, function: str, missing: Any = None) -> Any:
    """Runs the file `path` and returns what its `function` returns, called without arguments; `missing` without one.

    Raises:
      InputError: no such file, or a mistake in it, named with file and line.
    """
    if not Path(path).is_file() and path.startswith("configs/") and (REPOSITORY / path).is_file():
        path = str(REPOSITORY / path)  # those that were installed with the package
    if not Path(path).is_file():
        raise InputError(f"config file {path}: no such file{_like(path)}")
    namespace: dict[str, Any] = {"__name__": "config_file", "__file__": path}
    try:
        exec(compile(Path(path).read_bytes(), path, "exec"), namespace)
        found = namespace.get(function)
        return found() if callable(found) else missing
    except InputError:
        raise
    except Exception as error:
        reason = error.msg if isinstance(error, SyntaxError) else (str(error).splitlines() or ["no reason given"])[0]
        raise InputError(f"config file {_place(error, path)}: {type(error).__name__}: {reason}") from error


def known_files(*folders: Path) -> list[Path]:
    """The config files of `folders` and of the project, whose names are understood in any folder."""
    project = Path("configs")
    here = [*dict.fromkeys(folders)] + [project] * (project.is_dir() and project not in folders)
    files = [file for folder in here for file in sorted(folder.glob("*.py"))]
    if not project.is_dir():  # call() finds them
        files += [project / file.name for file in sorted((REPOSITORY / project).glob("*.py"))]
    return [file for file in files if file.stem != "__init__"]


def _like(path: str) -> str:
    """The known config files whose names are like `path`, as the end of an error."""
    folder = Path(path).parent
    files = known_files(*([folder] if folder != Path() else []))
    near = difflib.get_close_matches(Path(path).stem, [file.stem for file in files], n=1, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(str(file) for file in files if file.stem in near)}?"
    return f"; there are {', '.join(map(str, files))}" if files else ""


def _place(error: Exception, path: str) -> str:
    """The innermost file and line that is no library's: a config may fail in the config that it starts from."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    libraries = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<")
    place, trace = path, error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(libraries) and file != __file__:
            place = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def override(config: ConfigDict, overrides: Sequence[tuple[str, str]], prefix: str = "--config.") -> None:
    """Sets keys of `config` in place from text, in order: pairs of a key's path and its new value.

    A tuple takes a list with commas ("q_proj,v_proj"; commas within brackets belong to an item, so "h.\\d{1,2}.mlp" is
    one), or a Python literal; given again, it adds to what was given before. Other values: the last one holds.

    Raises:
      InputError: unknown key, with the nearest known ones, or a value that does not fit its key.
    """
    values = flatten(config)
    given: dict[str, tuple] = {}
    for key, text in overrides:
        flag = f"{prefix}{key}"
        inner = _keys_of(values, key)
        if inner:
            raise InputError(f"{flag}={text}: {key} is a section; set its keys, as {flag}.{inner[0]}=...")
        if key in GONE:
            raise InputError(f"{flag}: this key is gone, and every run is as with {GONE[key]!r}; leave it out")
        if key not in values:
            raise InputError(f"{flag}: no such key; {_hint(key, list(values), prefix)}")
        value = _parse_number(text, flag) if key in NUMBERS_OR_AUTO else _parse(text, values[key], flag)
        if isinstance(value, tuple):
            value = given[key] = given.get(key, ()) + value
        with config.ignore_type():  # the value's type is right, and a number may become "auto"
            config.update_from_flattened_dict({key: value})


def _keys_of(keys: Any, section: str) -> list[str]:
    return [key.removeprefix(f"{section}.") for key in keys if key.startswith(f"{section}.")]


def _hint(key: str, known: list[str], prefix: str) -> str:
    near = nearest(key, known)
    if near:
        return f"did you mean {' or '.join(prefix + path for path in near)}?"
    section = key.partition(".")[0]
    keys = _keys_of(known, section)
    if keys:
        return f"the keys of {section} are {', '.join(keys)}"
    return f"the sections are {', '.join(dict.fromkeys(path.partition('.')[0] for path in known))}"


def _parse(text: str, old: Any, flag: str) -> Any:
    """`text` as a value of the type of `old`."""
    if isinstance(old, tuple):
        return _parse_tuple(text, old, flag)
    if isinstance(old, bool):
        if text.lower() in BOOLS:
            return BOOLS[text.lower()]
        raise InputError(f"{flag}={text}: expected true or false")
    if isinstance(old, int):
        try:
            return int(text)
        except ValueError:
            raise InputError(f"{flag}={text}: expected an int (a whole number, as {old})") from None
    if isinstance(old, float):
        try:
            return float(text)
        except ValueError:
            raise InputError(f"{flag}={text}: expected a float (a number, as {old})") from None
    if isinstance(old, str):
        return text
    raise InputError(f"{flag}={text}: a value of type {type(old).__name__} can only be set in the config file")


def _parse_number(text: str, flag: str) -> int | str:
    try:
        return AUTO if text == AUTO else int(text)
    except ValueError:
        raise InputError(f"{flag}={text}: expected an int (a whole number), or {AUTO}") from None


def _parse_tuple(text: str, old: tuple, flag: str) -> tuple:
    kind = type(old[0]) if old else str
    try:
        literal = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        literal = None
    # a literal of another type is no literal: "[0]" may be a regular expression
    if isinstance(literal, tuple | list) and all(type(item) is kind for item in literal):
        return tuple(literal)
    items = [item.strip() for item in _split_at_commas(text)] if text.strip() else []
    if not all(items):
        raise InputError(f"{flag}={text}: an empty item; expected a list with commas, as a,b")
    return tuple(_parse(item, old[0], flag) if old else item for item in items)


def _split_at_commas(text: str) -> list[str]:
    r"""Splits at commas outside of (), [] and {}; what follows a backslash is no bracket."""
    items, depth = [""], 0
    for piece in re.findall(r"\\.|.", text, re.DOTALL):
        depth = max(0, depth + (piece in tuple("([{")) - (piece in tuple(")]}")))
        if piece == "," and depth == 0:
            items.append("")
        else:
            items[-1] += piece
    return items
