"""The axes of a mesh: what several devices divide among them.

    data    rows of a batch; each holds the whole model
    fsdp    rows of a batch, and every array of the model: each holds a part, and gathers a layer when it computes it

A row of devices along fsdp holds one copy of the model together. Rows of a batch are divided along both.
"""

from typing import Any, NamedTuple

from qlora_jax.errors import InputError

NAMES = ("data", "fsdp")
_TO_COME = ("tensor", "expert")


class Axes(NamedTuple):
    """Devices along each axis."""

    data: int = 1
    fsdp: int = 1

    @classmethod
    def of(cls, section: Any) -> "Axes":
        """The config's `mesh` section. Raises InputError for what no mesh is."""
        for key in ("devices", "data", *_TO_COME):
            if section[key] < 1:
                raise InputError(f"mesh.{key} is {section[key]}; expected at least 1")
        if section.fsdp < 0:
            raise InputError(f"mesh.fsdp is {section.fsdp}; expected devices, or 0 for those that other axes leave")
        for key in _TO_COME:
            if section[key] > 1:
                raise InputError(
                    f"mesh.{key} is {section[key]}; models are divided along fsdp, which holds any of them in parts: "
                    f"set mesh.fsdp={section[key]} and mesh.{key}=1"
                )
        devices = section.devices
        if section.fsdp == 0 and devices > 1:
            if devices % section.data:
                raise InputError(
                    f"mesh.devices is {devices}, which mesh.data = {section.data} does not divide: change one of them"
                )
            return cls(section.data, devices // section.data)
        axes = cls(section.data, max(section.fsdp, 1))
        if devices not in (1, axes.devices):
            raise InputError(
                f"mesh.devices is {devices}, but mesh.data = {axes.data} and mesh.fsdp = {axes.fsdp} take "
                f"{axes.devices}: change one of them, or leave mesh.devices out"
            )
        return axes

    @property
    def devices(self) -> int:
        """In all. Each computes its own rows of a batch."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        return f"data {self.data} x fsdp {self.fsdp}"
