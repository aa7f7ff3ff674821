"""The axes of a mesh: what several devices divide among them.

    data    rows of a batch; each holds the whole model
    fsdp    rows of a batch, and every array of the model: each holds a part, and gathers a layer when it computes it
    expert  rows of a batch, and a mixture's experts: each keeps its own, and tokens travel
    tensor  each product: its devices compute the same rows together

Rows of a batch are divided along all but tensor.
"""

from typing import Any, NamedTuple

from qlora_jax.errors import InputError

FSDP = "fsdp"
EXPERT = "expert"
TENSOR = "tensor"
ROWS = ("data", FSDP, EXPERT)  # along which rows of a batch are divided
_TO_COME = (EXPERT,)


class Axes(NamedTuple):
    """Devices along each axis."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, section: Any) -> "Axes":
        """The config's `mesh` section; what is not there is 1, fsdp 0. Raises InputError for what no mesh is."""
        section = {} if section is None else section
        found = {key: section.get(key, 1) for key in ("devices", "data", EXPERT, TENSOR)}
        found["fsdp"] = section.get("fsdp", 0)
        for key, value in found.items():
            if value < (key != "fsdp"):
                wanted = "at least 1" if key != "fsdp" else "devices, or 0 for those that mesh.data leaves"
                raise InputError(f"mesh.{key} is {value}; expected {wanted}")
        for key in _TO_COME:
            if found[key] > 1:
                raise InputError(
                    f"mesh.{key} is {found[key]}; models are divided along fsdp, which holds any of them in parts: "
                    f"set mesh.fsdp={found[key]} and mesh.{key}=1"
                )
        devices, data, tensor = found["devices"], found["data"], found[TENSOR]
        more = f" * mesh.tensor = {tensor}" if tensor > 1 else ""
        if found["fsdp"] == 0 and devices > 1:
            if devices % (data * tensor):
                raise InputError(
                    f"mesh.devices is {devices}, which mesh.data = {data}{more} does not divide: change one of them"
                )
            return cls(data, devices // (data * tensor), tensor=tensor)
        axes = cls(data, max(found["fsdp"], 1), tensor=tensor)
        if devices not in (1, axes.devices):
            more = more.replace(" *", " and")
            raise InputError(
                f"mesh.devices is {devices}, but mesh.data = {axes.data} and mesh.fsdp = {axes.fsdp}{more} take "
                f"{axes.devices}: change one of them, or leave mesh.devices out"
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
        return self.row_parts * self.tensor

    @property
    def row_parts(self) -> int:
        """Parts that rows of a batch are divided into, one for each device or each group of them along tensor."""
        return self.data * self.fsdp * self.expert

    def rows(self, batch: int) -> int:
        """Of a batch of so many sequences, those of each device. Raises InputError where they are not equally many."""
        if batch % self.row_parts:
            raise InputError(
                f"batches of {batch} sequences cannot be divided among {self.row_parts} devices ({self}): make "
                "train.batch_size a multiple"
            )
        return batch // self.row_parts

    def __str__(self) -> str:
        more = "".join(f" x {name} {getattr(self, name)}" for name in (EXPERT, TENSOR) if getattr(self, name) > 1)
        return f"data {self.data} x fsdp {self.fsdp}{more}"


ONE = Axes()  # device
