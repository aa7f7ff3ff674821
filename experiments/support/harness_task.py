"""evaluate --task=lm-eval: its flags, and EleutherAI's harness from the names of tasks to their results."""

import difflib
import json
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from experiments.support.model_flags import ModelFlags

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# flags defined in here belong to the command that calls
flags.disclaim_key_flags()

# of the harness's results, what is written; the rest describes the machine
KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")

BOOTSTRAP = 1000  # resamples, for the standard errors of metrics without a formula


class HarnessFlags(NamedTuple):
    tasks: flags.FlagHolder
    include_path: flags.FlagHolder
    limit: flags.FlagHolder
    num_fewshot: flags.FlagHolder
    gen_kwargs: flags.FlagHolder
    apply_chat_template: flags.FlagHolder
    seed: flags.FlagHolder


def harness_flags() -> HarnessFlags:
    """Defines the flags for the calling command."""
    return HarnessFlags(
        flags.DEFINE_list("tasks", [], "tasks, groups or tags of lm-eval, by name"),
        flags.DEFINE_string("include_path", None, "folder of further task files (.yaml); the Python they name is run"),
        flags.DEFINE_integer("limit", None, "only the first questions of each task", lower_bound=1),
        flags.DEFINE_integer("num_fewshot", None, "example questions before each; the task's own by default", 0),
        flags.DEFINE_string("gen_kwargs", None, "of generating tasks, such as max_gen_toks=32,temperature=0.7"),
        flags.DEFINE_bool("apply_chat_template", False, "ask in the model's own chat template"),
        flags.DEFINE_integer("seed", 0, "of the tasks' examples and of sampled answers", lower_bound=0),
    )


def measure(
    own: HarnessFlags, model: ModelFlags, context: int | None, batch_size: int | None
) -> tuple[dict[str, Any], str]:
    """The result, as it is written, and a table of it."""
    from qlora_jax.errors import InputError

    if not own.tasks.value:
        raise InputError("--task=lm-eval takes --tasks=NAME,NAME")
    check_extra()
    import lm_eval
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.utils import handle_non_serializable

    from qlora_jax.evaluate.harness import HarnessModel
    from qlora_jax.io.remote import name_of

    tasks, manager = load_tasks(own.tasks.value, own.include_path.value)
    folder = model.folder()
    tokenizer = model.tokenizer()
    loaded = model.load()
    adapted = HarnessModel(loaded.model, tokenizer, name_of(folder), context, batch_size, own.seed.value)
    started = time.perf_counter()
    seed = own.seed.value
    os.environ["DISABLE_MULTIPROC"] = "1"  # a fork for the harness's bootstrap may hang: JAX has threads
    found = simple_evaluate(
        adapted,
        tasks=tasks,
        num_fewshot=own.num_fewshot.value,
        limit=own.limit.value,
        gen_kwargs=own.gen_kwargs.value,
        apply_chat_template=own.apply_chat_template.value,
        log_samples=False,
        bootstrap_iters=BOOTSTRAP,
        random_seed=seed,
        numpy_random_seed=seed,
        fewshot_random_seed=seed,
        task_manager=manager,  # without one it reads all of the harness's own tasks, for nothing
    )
    kept = {key: found[key] for key in KEPT if key in found}
    result = {
        "task": "lm-eval",
        "quant": loaded.quant,
        **json.loads(json.dumps(kept, default=handle_non_serializable)),
        "limit": own.limit.value,
        "gen_kwargs": own.gen_kwargs.value,
        "apply_chat_template": own.apply_chat_template.value,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 3),
        "lm_eval_version": lm_eval.__version__,
        "model": model.model.value,
        "adapter": model.adapter.value,
    }
    return result, table(result)


def table(result: dict[str, Any]) -> str:
    """Every metric of every task and group. (The harness's own table is written by forks, which JAX may hang in.)"""
    from qlora_jax.evaluate.tables import as_text

    rows = []
    for name, found in {**result["results"], **result.get("groups", {})}.items():
        for key, value in found.items():
            metric, comma, filter = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = found.get(f"{metric}_stderr,{filter}")
            shown = [f"{x:.4f}" if isinstance(x, int | float) else "" for x in (value, error)]
            rows.append([name, metric, filter, *shown])
    return as_text(("task", "metric", "filter", "value", "standard error"), rows)


def check_extra() -> None:
    """Raises InputError where the harness is not installed."""
    from qlora_jax.errors import InputError

    try:
        import lm_eval.api.model  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"--task=lm-eval needs EleutherAI's harness ({error}): pip install 'qlora_jax[eval]'"
        ) from error


def load_tasks(names: list[str], include_path: str | None) -> tuple[list[Any], "TaskManager"]:
    """Tasks and groups of these names, with their data; and the harness's list of tasks that has them.

    Raises:
      InputError: an unknown name, a folder that is not there, or a task that cannot be loaded.
    """
    from pathlib import Path

    from lm_eval.tasks import TaskManager

    from qlora_jax.errors import InputError

    if include_path is not None and not Path(include_path).expanduser().is_dir():
        raise InputError(f"--include_path={include_path}: no such folder")
    manager = None
    if include_path is not None:
        manager = TaskManager(include_path=Path(include_path).expanduser(), include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_tasks) - set(manager.all_groups):
        # the harness's own tasks are thousands of files: read where a name, or a group's member, may be one of them
        manager = TaskManager(include_path=None if include_path is None else Path(include_path).expanduser())
    _check_known(names, manager)
    try:
        loaded = manager.load(names)
    except Exception as error:  # of task files and data that are not ours
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"--tasks={','.join(names)} cannot be loaded: {type(error).__name__}: {reason}") from error
    groups = [group for name, group in loaded.get("groups", {}).items() if name in names]
    inside = {task.task_name for group in groups for task in group.get_all_tasks()}
    return groups + [task for name, task in loaded["tasks"].items() if name not in inside], manager


def _check_known(names: list[str], manager: "TaskManager") -> None:
    """Raises InputError for a name, or a member of a group, that the manager does not have.

    The harness takes such a member for the whole config of a task, and fails at what that lacks.
    """
    from qlora_jax.errors import InputError

    asked, seen = [(name, "") for name in names], set()
    for name, where in asked:  # members of its groups are added on the way
        if name in seen:
            continue
        seen.add(name)
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise InputError(f"unknown task {name!r}{where}{hint}")
        members = (manager.task_index[name].cfg or {}).get("task")
        if isinstance(members, list):
            asked += [(member, f" in the group {name!r}") for member in members if isinstance(member, str)]
