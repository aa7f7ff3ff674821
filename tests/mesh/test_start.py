"""What is no run of several processes is refused before any of them waits for another."""

import pytest

from qlora_jax.errors import InputError
from qlora_jax.mesh.processes import start


@pytest.mark.parametrize(
    "given, said",
    [
        (("foo", 2, 0), "--coordinator is 'foo'; expected HOST:PORT"),
        (("http://host:1", 2, 0), "expected HOST:PORT"),
        (("127.0.0.1:3999", 2, 2), "--process is 2 of --processes = 2; they are counted from 0"),
        (("127.0.0.1:3999", 0, 0), "--process is 0 of --processes = 0"),
        ((None, None, None), "start them by srun or mpirun, or give --coordinator"),
    ],
)
def test_what_cannot_meet_is_refused(given, said):
    with pytest.raises(InputError, match=said) as refused:
        start(*given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "environment, devices",
    [
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, []),  # all of the machine's, of which JAX takes one
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_NODES": "2"}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, None),
    ],
)
def test_the_only_process_of_a_machine_has_all_of_its_devices(environment, devices, monkeypatch):
    asked: list = []
    monkeypatch.setattr("jax.distributed.initialize", lambda *_, **given: asked.append(given["local_device_ids"]))
    monkeypatch.setattr("qlora_jax.mesh.failures.watch", lambda: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    start()
    assert asked == [devices]
    start("127.0.0.1:3999", 2, 0)
    assert asked[1] is None
