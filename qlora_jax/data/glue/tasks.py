"""The tasks of GLUE: where their texts and labels stand, what the labels are called, and how they are measured.

Columns are those of the owners' files (gluebenchmark.com, the folders of glue_data) and of the hub's nyu-mll/glue; the
order of the labels, whose places are the classes, is the hub's.
"""

import dataclasses
import difflib
import re

from qlora_jax.errors import InputError

FORMAT = "glue"  # of data.format
ACCURACY, F1, MATTHEWS, PEARSON, SPEARMAN = "accuracy", "f1", "matthews", "pearson", "spearman"
Columns = tuple[tuple[str, ...], str]  # of one or two texts, and of the label


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    forms: columns of a row, whichever of them it has. labels: names of the classes, () for a number. metrics: what is
    measured; the task's score is their mean. headless: columns of an owners' .tsv file without a header.
    torn_lines: the owners' file has lines that are torn apart, which all who read it leave out.
    """

    name: str
    forms: tuple[Columns, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = (ACCURACY,)
    headless: tuple[str, ...] = ()
    torn_lines: bool = False

    @property
    def classes(self) -> int:
        """Outputs of the head: one for each label, 1 for a number."""
        return len(self.labels) or 1


_PAIR, _ENTAILS = ("sentence1", "sentence2"), ("entailment", "not_entailment")
TASKS = {
    task.name: task
    for task in (
        Task(
            "cola", ((("sentence",), "label"),), ("unacceptable", "acceptable"), (MATTHEWS,),
            ("source", "label", "mark", "sentence"),
        ),
        Task("sst2", ((("sentence",), "label"),), ("negative", "positive")),
        Task(
            "mrpc", ((_PAIR, "label"), (("#1 String", "#2 String"), "Quality")), ("not_equivalent", "equivalent"),
            (ACCURACY, F1),
        ),
        Task(
            "qqp", ((("question1", "question2"), "label"), (("question1", "question2"), "is_duplicate")),
            ("not_duplicate", "duplicate"), (ACCURACY, F1), torn_lines=True,
        ),
        Task("stsb", ((_PAIR, "label"), (_PAIR, "score")), (), (PEARSON, SPEARMAN)),
        Task(
            "mnli", ((("premise", "hypothesis"), "label"), (_PAIR, "gold_label")),
            ("entailment", "neutral", "contradiction"),
        ),
        Task("qnli", ((("question", "sentence"), "label"),), _ENTAILS),
        Task("rte", ((_PAIR, "label"),), _ENTAILS),
        Task("wnli", ((_PAIR, "label"),), ("not_entailment", "entailment")),
    )
}  # fmt: skip
# The paper's eight: WNLI is left out, as GLUE's own page advises and the 16-bit results that it compares with do.
PAPER = tuple(name for name in TASKS if name != "wnli")
_OTHER_NAMES = {"sst": "sst2", "sts": "stsb", "mnlimm": "mnli", "mnlimatched": "mnli", "mnlimismatched": "mnli"}


def task_named(name: str) -> Task:
    """One of TASKS, by its name or its folder's ("STS-B"). Raises InputError, with the nearest, for another."""
    found = _known(name)
    if found is None:
        near = difflib.get_close_matches(_letters(name), TASKS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"data.task is {name!r}, no task of GLUE{hint}; expected one of {', '.join(TASKS)}")
    return found


def task_of(asked: str, path: str) -> Task:
    """The task of a data set: `asked` (data.task), or where that is "" as a folder or file of its name is called, the
    last one that is. Raises InputError where none is."""
    if asked:
        return task_named(asked)
    for part in reversed(re.split(r"[/\\:]", path)):
        if (found := _known(part) or _known(part.partition(".")[0])) is not None:
            return found
    raise InputError(
        f"{path}: which task of GLUE this is neither its name nor data.task says; set data.task to one of "
        f"{', '.join(TASKS)}"
    )


def _known(name: str) -> Task | None:
    letters = _letters(name)
    return TASKS.get(_OTHER_NAMES.get(letters, letters))


def _letters(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())
