"""A small folder of Super-NaturalInstructions in its owners' form."""

import json
from pathlib import Path
from typing import Any


def a_task(instances: int = 3, examples: int = 3) -> dict[str, Any]:
    return {
        "Contributors": ["Somebody"], "Categories": ["Title Generation"], "Reasoning": [],
        "Definition": ["Say what the animal does"], "Input_language": ["English"],
        "Positive Examples": [
            {"input": f"the cat {n}", "output": f"it reads {n}!", "explanation": "it does"} for n in range(examples)
        ],
        "Negative Examples": [{"input": "a dog", "output": "no", "explanation": "it does not"}],
        "Instances": [{"id": f"t-{n}", "input": f" bird {n}\n", "output": [f"sings {n}", "it sings"]}
                      for n in range(instances)],
    }  # fmt: skip


def write_folder(folder: Path, tasks: dict[str, list[dict[str, Any]]]) -> Path:
    """`tasks`: of each list ("train", "test"), in its order; named NAME_0, NAME_1, ..."""
    (folder / "tasks").mkdir(parents=True)
    (folder / "splits" / "default").mkdir(parents=True)
    for name, of_list in tasks.items():
        names = [f"{name}_{number}" for number in range(len(of_list))]
        (folder / "splits" / "default" / f"{name}_tasks.txt").write_text("".join(f"{each}\n" for each in names))
        for each, task in zip(names, of_list, strict=True):
            (folder / "tasks" / f"{each}.json").write_text(json.dumps(task, indent=4))
    return folder
