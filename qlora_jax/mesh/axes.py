"""The axes of a mesh: what several devices divide among them.

    data      rows of a batch; each holds the whole model
    fsdp      rows of a batch, and every array of the model: each holds a part, and gathers a layer when it computes it
    expert    the same, but for a mixture's experts: each keeps its own, and tokens travel
    tensor    each product: its devices compute the same rows together
    sequence  the tokens of each row; every array of the model as fsdp does

Rows of a batch are divided along the first three.
"""

import math
from typing import Any, NamedTuple

from qlora_jax.errors import InputError

FSDP = "fsdp"
EXPERT = "expert"
TENSOR = "tensor"
SEQUENCE = "sequence"
ROWS = ("data", FSDP, EXPERT)  # along which rows of a batch are divided
TOKENS = (*ROWS, SEQUENCE)  # along which each device has tokens of its own
ORDER = (*TOKENS, TENSOR)  # of a mesh's devices: those along tensor, which tell each other most, are neighbours
_OTHERS = (EXPERT, TENSOR, SEQUENCE)  # that are named where they are more than one


class Axes(NamedTuple):
    """Devices along each axis."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    sequence: int = 1

    @classmethod
    def of(cls, section: Any) -> "Axes":
        """The config's `mesh` section; what is not there is 1, fsdp 0. Raises InputError for what no mesh is."""
        section = {} if section is None else section
        found = {key: section.get(key, 1) for key in ("devices", "data", *_OTHERS)} | {"fsdp": section.get("fsdp", 0)}
        for key, value in found.items():
            if value < (key != "fsdp"):
                wanted = "at least 1" if key != "fsdp" else "devices, or 0 for those that mesh.data leaves"
                raise InputError(f"mesh.{key} is {value}; expected {wanted}")
        if min(found[EXPERT], found[TENSOR]) > 1:
            raise InputError(
                f"mesh.expert is {found[EXPERT]} and mesh.tensor {found[TENSOR]}; a mixture's devices divide either "
                "experts or products: set one of them to 1"
            )
        devices, axes = found["devices"], cls(
            found["data"], found["fsdp"] or 1, found[EXPERT], found[TENSOR], found[SEQUENCE]
        )
        if found["fsdp"] == 0 and devices > 1:
            if devices % axes.devices:
                raise InputError(
                    f"mesh.devices is {devices}, which {axes._keys('data')} does not divide: change one of them"
                )
            return axes._replace(fsdp=devices // axes.devices)
        if devices not in (1, axes.devices):
            raise InputError(
                f"mesh.devices is {devices}, but {axes._keys('data', FSDP)} take {axes.devices}: change one of them, "
                "or leave mesh.devices out"
            )
        return axes

    @classmethod
    def of_one(cls, section: Any, what: str) -> None:
        """Raises InputError where the config's `mesh` section is of several devices, and `what` is of one."""
        if (axes := cls.of(section)).devices > 1:
            raise InputError(
                f"{what} one device, but the mesh ({axes}) has {axes.devices}: set mesh.devices=1, or train such a run "
                "by itself (experiments.train)"
            )

    @property
    def devices(self) -> int:
        """In all."""
        return self.row_parts * self.tensor * self.sequence

    @property
    def row_parts(self) -> int:
        """Parts that rows of a batch are divided into, one for each device or each group along tensor and sequence."""
        return self.data * self.fsdp * self.expert

    def along(self, names: tuple[str, ...]) -> int:
        """Devices along some of the axes together."""
        return math.prod(getattr(self, name) for name in names)

    def rows(self, batch: int) -> int:
        """Of a batch of so many sequences, those of each device. Raises InputError where they are not equally many."""
        if batch % self.row_parts:
            raise InputError(
                f"batches of {batch} sequences cannot be divided among {self.row_parts} devices ({self}): make "
                "train.batch_size a multiple, or divide the tokens of each row (mesh.sequence)"
            )
        return batch // self.row_parts

    def all_rows(self) -> str:
        """The keys that divide rows alone among as many devices, for messages."""
        ones = "".join(f", mesh.{name}=1" for name in _OTHERS if getattr(self, name) > 1)
        return f"mesh.data={self.devices} and mesh.fsdp=1{ones}"

    def fitting(self, devices: int) -> str:
        """What to set for so many, for messages."""
        if self.devices == self.fsdp:
            return f"mesh.devices={devices}"
        keys = [f"mesh.{name}" for name, size in self._asdict().items() if size > 1]
        return f"{', '.join(keys)} so that the devices are {devices}"

    def _keys(self, *always: str) -> str:
        """Of a config: "mesh.data = 2 x mesh.expert = 4", those named and those that are not 1."""
        sizes = self._asdict().items()
        return " x ".join(f"mesh.{name} = {size}" for name, size in sizes if name in always or size > 1)

    def __str__(self) -> str:
        more = "".join(f" x {name} {size}" for name, size in self._asdict().items() if name in _OTHERS and size > 1)
        return f"data {self.data} x fsdp {self.fsdp}{more}"


ONE = Axes()  # device
