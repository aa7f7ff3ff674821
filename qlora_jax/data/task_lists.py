"""Super-NaturalInstructions as its owners publish it: a list of tasks, one name a line, stands for those tasks' files.

    FOLDER/splits/default/train_tasks.txt          names as task001_quoref_question_generation
    FOLDER/tasks/task001_quoref_question_generation.json

Source: github.com/allenai/natural-instructions.
"""

from pathlib import Path

from qlora_jax.errors import InputError

END = "_tasks.txt"  # of a list's name
_LISTS = "splits/default"


def is_task_list(name: str) -> bool:
    return name.endswith(END)


def task_files(file: Path, label: str) -> list[tuple[str, Path]]:
    """The tasks of a list: each with its name in errors, in the list's order.

    Raises InputError for a list without names, or a task without a file.
    """
    names = list(dict.fromkeys(line.strip() for line in file.read_text(encoding="utf-8").split("\n")))
    names = [name for name in names if name]
    if not names:
        raise InputError(f"{label} names no tasks; expected one name a line, as task001_quoref_question_generation")
    folders = [parent / "tasks" for parent in file.resolve().parents[:3]]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise InputError(f"{label}: there is no folder tasks beside it or up to two folders above, which has its tasks")
    files = [(f"{label}: {name}.json", folder / f"{name}.json") for name in names]
    if missing := [path for _, path in files if not path.is_file()]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"{label} names a task whose file {missing[0]} is not there{more}")
    return files


def lists_in(folder: Path) -> str:
    """The lists of a folder of the owners', as the end of an error; "" for another folder."""
    names = sorted(path.name for path in (folder / _LISTS).glob(f"*{END}"))
    return f"; name one of its lists of tasks: {', '.join(f'{folder / _LISTS}/{name}' for name in names)}" * bool(names)
