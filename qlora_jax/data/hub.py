"""Which files of a hub data set are its training rows, and fetching them through huggingface_hub: all of them, or one
at a time for what the disk does not hold.

The endpoint is HF_ENDPOINT's, the token is the one huggingface_hub finds by itself; neither is ever printed. What
was fetched before is read from the cache when the hub cannot be reached.
"""

import contextlib
import errno
import fnmatch
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from qlora_jax.errors import InputError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[^:]+)?")
_TRAIN = re.compile(r"(^|[/_.-])train(?=[/_.-]|$)")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
# Cards about the data, not the data.
_NOT_DATA = {"dataset_infos.json", "dataset_dict.json", "dataset_info.json", "state.json", "metadata.json"}


class Unreachable(InputError):
    """The hub could not be reached, or could not answer."""


class Shard(NamedTuple):
    """A file of a hub data set. `label` names it in errors; `content` changes with its content, as the hub says it;
    `commit` is what the revision stood for."""

    label: str
    repo: str
    name: str
    commit: str
    content: str
    bytes: int


def looks_like_dataset(path: str) -> bool:
    """Whether `path` has the form `owner/name` or `owner/name:file`; the file may be a pattern, as `data/*.parquet`."""
    return _NAME.fullmatch(path) is not None


def dataset_files(
    path: str, revision: str, suffixes: tuple[str, ...], most: int | None = None
) -> list[tuple[str, Path]]:
    """The training files of `owner/name` at `revision`, or the files of `owner/name:file`, fetched: the first `most`.

    Returns:
      (label, local path) of every file, shards in their order; a label is `owner/name:file`.

    Raises:
      InputError: no such data set, revision or file, no access, no connection, or no clear choice of files.
    """
    repo, _, file = path.partition(":")
    is_named = file and not _is_pattern(file)
    files = [file] if is_named else _chosen(repo, file, _list_files(repo, revision), suffixes)
    return [(f"{repo}:{name}", _download(repo, name, revision)) for name in files[:most]]


def shards(path: str, revision: str, suffixes: tuple[str, ...]) -> list[Shard]:
    """The files that `dataset_files` gives, none of them fetched. Raises InputError as it does."""
    repo, _, file = path.partition(":")
    try:
        info = _hub().HfApi(endpoint=_endpoint()).dataset_info(repo, revision=revision, files_metadata=True)
    except Exception as error:
        raise _explained(error, repo, revision) from None
    there = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    if file and not _is_pattern(file) and file not in there:
        raise InputError(f"{path}: no such file in the data set at revision {revision!r}")
    found = []
    for name in _chosen(repo, file, list(there), suffixes):
        sibling, commit = there[name], str(info.sha or revision)
        lfs = getattr(sibling, "lfs", None)
        content = getattr(lfs, "sha256", None) or getattr(sibling, "blob_id", None) or f"{commit} {name}"
        found.append(Shard(f"{repo}:{name}", repo, name, commit, content, getattr(sibling, "size", None) or 0))
    return found


@contextlib.contextmanager
def fetched(shard: Shard, folder: Path) -> Iterator[Path]:
    """The file of a shard, in `folder` for as long as the context lasts. Raises InputError, or OSError for a full
    disk."""
    raw = folder / "raw"
    try:
        yield _download(shard.repo, shard.name, shard.commit, local_dir=raw)
    finally:
        shutil.rmtree(raw, ignore_errors=True)


def _is_pattern(file: str) -> bool:
    return any(sign in file for sign in "*?[")


def _chosen(repo: str, file: str, names: list[str], suffixes: tuple[str, ...]) -> list[str]:
    """The training files, or those that a name or pattern stands for."""
    if not file:
        return choose_train_files(repo, names, suffixes)
    if not _is_pattern(file):
        return [file]
    found = sorted(name for name in names if fnmatch.fnmatchcase(name, file) and name.lower().endswith(suffixes))
    if not found:
        raise InputError(f"{repo} has no data file like {file}; its files: {_some(sorted(names))}")
    return found


def file_names(repo: str, revision: str) -> list[str]:
    """All files of `owner/name` at `revision`, by name. Raises InputError as dataset_files does."""
    return _list_files(repo, revision)


def choose_train_files(repo: str, names: list[str], suffixes: tuple[str, ...]) -> list[str]:
    """The one data file, or the one whose name or folder says "train", all its shards.

    Raises:
      InputError: there is none, there is more than one, or shards are missing; the files are listed.
    """
    data = sorted(name for name in names if name.lower().endswith(suffixes) and not _is_about_data(name))
    if not data:
        raise InputError(f"{repo} has no {', '.join(suffixes)} file; its files: {_some(sorted(names))}")
    candidates = [name for name in data if _TRAIN.search(name.lower())] or data
    # Shards of one file share the name around their number, but for a hash that some writers append.
    groups: dict[str, list[str]] = {}
    for name in candidates:
        shard = _SHARD.search(name)
        groups.setdefault(f"{name[: shard.start()]}-of-{shard[2]}" if shard else name, []).append(name)
    if len(groups) > 1:
        raise InputError(f"{repo} has several data files: {_some(candidates)}; pick one as {repo}:{candidates[0]}")
    (files,) = groups.values()
    shard = _SHARD.search(files[0])
    if shard and len(files) != int(shard[2]):
        raise InputError(f"{repo} has {len(files)} of the {int(shard[2])} shards of its training data: {_some(files)}")
    return files


def _is_about_data(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return parts[-1].lower() in _NOT_DATA or any(part.startswith(".") for part in parts)


def _some(names: list[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _list_files(repo: str, revision: str) -> list[str]:
    hub = _hub()
    try:
        info = hub.HfApi(endpoint=_endpoint()).dataset_info(repo, revision=revision)
        return [sibling.rfilename for sibling in info.siblings or ()]
    except Exception as error:
        if _answered(error):
            raise _explained(error, repo, revision) from None
        try:
            folder = Path(hub.snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True))
        except Exception:
            raise _explained(error, repo, revision) from None
        return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


def _download(repo: str, name: str, revision: str, local_dir: Path | None = None) -> Path:
    kept = {} if local_dir is None else {"local_dir": local_dir}
    try:
        return Path(
            _hub().hf_hub_download(repo, name, repo_type="dataset", revision=revision, endpoint=_endpoint(), **kept)
        )
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            if local_dir is not None:
                raise
            raise InputError(
                f"{repo}:{name}: {os.strerror(error.errno)}; free space under HF_HOME (~/.cache/huggingface), or read "
                "it piece by piece with data.streaming"
            ) from None
        raise _explained(error, f"{repo}:{name}", revision) from None


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError("reading a hub data set needs huggingface_hub: pip install huggingface_hub") from error
    return huggingface_hub


def _endpoint() -> str | None:
    # huggingface_hub reads the variable once, when it is imported; a program may set it later.
    return os.environ.get("HF_ENDPOINT") or None


def _answered(error: Exception) -> bool:
    """Whether the hub was reached and said no, so that an old copy in the cache must not stand in."""
    response = getattr(error, "response", None)
    return response is not None and 400 <= response.status_code < 500


def _explained(error: Exception, what: str, revision: str) -> InputError:
    """A clear line for huggingface_hub's errors. Their own texts are left out: they may quote request headers."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        reason = "its owner grants access on request; ask for it on the hub, then log in with `hf auth login`"
    elif "RepositoryNotFoundError" in kinds:
        reason = "no local file, and no data set of that name on the hub (a private one needs `hf auth login`)"
    elif "RevisionNotFoundError" in kinds:
        reason = f"has no revision {revision!r}; data.revision is a branch, tag or commit"
    elif "LocalEntryNotFoundError" not in kinds and "EntryNotFoundError" in kinds:
        reason = f"no such file in the data set at revision {revision!r}"
    elif "HFValidationError" in kinds:
        reason = "no local file, and not a valid name of a hub data set (owner/name)"
    elif getattr(error, "response", None) is not None:
        reason = f"the hub answered with HTTP status {error.response.status_code}"  # type: ignore[attr-defined]
    else:
        reason = f"no local file, and the hub cannot be reached ({type(error).__name__}); is HF_ENDPOINT right?"
        return Unreachable(f"{what}: {reason}")
    return InputError(f"{what}: {reason}")
