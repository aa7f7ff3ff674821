"""The notebooks under examples/ run from their first cell to their last, here on a model that is smaller still."""

import json
from pathlib import Path

import pytest

from qlora_jax import embedded
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.quick_compile

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def code_cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(notebook, tmp_path, monkeypatch):
    # the longest row has 163 tokens, and what a packed row has beyond it is padding: no two rows fit into 256 either
    monkeypatch.setitem(embedded.MODELS, "quickstart", str(write_tiny_checkpoint(tmp_path / "model", context=192)))
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(notebook)):
        exec(compile(cell, f"{notebook.name}, cell {number}", "exec"), names)
    losses = names["run"].losses
    assert losses[-1] < losses[0] / 2
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    assert len(names["answers"]) == 2


@pytest.mark.parametrize("notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs(notebook):
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
