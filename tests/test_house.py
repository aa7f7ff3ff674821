"""The house: rooms have an order and imports follow it one way, no files import each other, a room can be overlooked.

Imports inside functions and under TYPE_CHECKING count: a reader follows them as well.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("experiments", "qlora_jax", "pallas_kernels", "configs")
# From the top down: a room may import those below it. WORKSPACE.md draws the same order.
ORDER = (
    "experiments",
    "experiments.support",
    "configs",
    "qlora_jax",  # the front door: it hands on names of the rooms below when they are asked for
    "qlora_jax.api",
    "qlora_jax.report",
    "qlora_jax.doctor",
    "qlora_jax.sweep",
    "qlora_jax.bench",
    "qlora_jax.planning",
    "qlora_jax.packs",
    "qlora_jax.train",
    "qlora_jax.evaluate",
    "qlora_jax.generate",
    "qlora_jax.feed",
    "qlora_jax.data",
    "qlora_jax.text",
    "qlora_jax.io",
    "qlora_jax.optim",
    "qlora_jax.lora",
    "qlora_jax.residual",
    "qlora_jax.models",
    "qlora_jax.mesh",
    "qlora_jax.quant",
    "qlora_jax.files",
    "qlora_jax.progress",
    "qlora_jax.finite",
    "qlora_jax.config_file",
    "qlora_jax.base",
    "qlora_jax.settings",
    "qlora_jax.checksums",
    "qlora_jax.embedded",
    "qlora_jax.errors",
    "pallas_kernels.attention",
    "pallas_kernels.int8_matmul",
    "pallas_kernels.nf4_matmul",
    "pallas_kernels",
)
MOST_FILES = 15  # of a room; __init__.py is its sign, not a file of it
# Rooms whose files are of one kind and are no way through: the commands, and one experiment a config.
LISTS = ("experiments", "configs", "configs.sweeps")


@cache
def modules() -> dict[str, Path]:
    """Name -> file, of every module of the project."""
    found = {}
    for package in PACKAGES:
        for file in sorted((REPOSITORY / package).rglob("*.py")):
            parts = file.relative_to(REPOSITORY).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the project's modules that it imports."""
    found: dict[str, set[str]] = {}
    for name, file in modules().items():
        found[name] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names if alias.name in modules()}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module, f"{file}: a relative import"
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= inner & modules().keys() or {node.module} & modules().keys()
    return found


def room(module: str) -> str:
    """The longest entry of ORDER that the module is, or is in. A package's __init__ is in the package."""
    parts = module.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next(prefix for prefix in prefixes if prefix in ORDER)


def test_every_room_has_a_place_in_the_order():
    homeless = {name for name in modules() if name.startswith("qlora_jax.") and room(name) == "qlora_jax"}
    assert not homeless


def test_the_order_names_only_what_is_there():
    assert set(ORDER) <= modules().keys()


def test_no_import_runs_up():
    up = [
        f"{name} imports {target}"
        for name, targets in imports().items()
        for target in targets
        if ORDER.index(room(name)) > ORDER.index(room(target))
    ]
    assert not up


def test_no_files_import_each_other():
    assert not [" -> ".join(circle) for circle in circles(imports())]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Circles of a graph, one for each file that closes one."""
    done: set[str] = set()
    found: list[list[str]] = []

    def follow(name: str, way: list[str]) -> None:
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in done:
            for target in sorted(graph[name]):
                follow(target, [*way, name])
            done.add(name)

    for name in graph:
        follow(name, [])
    return found


@pytest.mark.parametrize(
    "graph, found",
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, 0),
        ({"a": {"b"}, "b": {"a"}}, 1),
        ({"a": {"b", "c"}, "b": {"c"}, "c": {"d"}, "d": {"b"}}, 1),
        ({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}, 0),
    ],
)
def test_circles_are_found(graph, found):
    assert len(circles(graph)) == found


def test_a_room_can_be_overlooked():
    rooms: dict[Path, int] = {}
    for file in modules().values():
        rooms[file.parent] = rooms.get(file.parent, 0) + (file.name != "__init__.py")
    names = {str(folder.relative_to(REPOSITORY)).replace("/", "."): count for folder, count in rooms.items()}
    assert not {name: count for name, count in names.items() if count > MOST_FILES and name not in LISTS}


def test_experiments_lists_commands_alone():
    strangers = [
        name
        for name, file in modules().items()
        if name.count(".") == 1 and name.startswith("experiments.") and file.name != "__init__.py"
        if "cli.run(main)" not in file.read_text()
    ]
    assert not strangers


def test_the_map_draws_the_order():
    """WORKSPACE.md lists the rooms of the library in the order that holds here."""
    text = (REPOSITORY / "WORKSPACE.md").read_text()
    names = [name.removeprefix("qlora_jax.") for name in ORDER if name.startswith("qlora_jax.")]
    files = {name for name in names if (REPOSITORY / "qlora_jax" / f"{name}.py").is_file()}
    places = [text.find(f"\n  {name}.py " if name in files else f"\n  {name}/ ") for name in names]
    assert -1 not in places, [name for name, place in zip(names, places, strict=True) if place < 0]
    assert places == sorted(places)
