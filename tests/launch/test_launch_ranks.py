from __future__ import annotations

import pytest

from megalm.errors import UserError
from megalm.launch.ranks import Process, first_host, who_am_i

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456", "SLURM_NTASKS": "4",
}  # fmt: skip


def test_each_launcher_says_who_a_process_is() -> None:
    assert who_am_i({}) == Process()
    assert who_am_i(TORCHRUN) == Process(5, 1, 8, "node1", 29500)
    assert who_am_i({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}).agent
    assert who_am_i(SRUN) == Process(3, 1, 4, "gpu07", 23456)
    assert who_am_i({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7000"}) == Process(3, 1, 4, "10.0.0.1", 7000)


def test_a_launcher_inside_a_slurm_step_decides_and_a_script_outside_of_steps_is_one_process() -> None:
    assert who_am_i({**SRUN, **TORCHRUN}) == who_am_i(TORCHRUN)
    script = {name: value for name, value in SRUN.items() if "STEP" not in name}
    assert who_am_i(script) == Process()


@pytest.mark.parametrize("missing", TORCHRUN)
def test_a_half_set_environment_names_what_is_missing(missing: str) -> None:
    with pytest.raises(UserError, match=f"^{missing} is not set, although"):
        who_am_i({name: value for name, value in TORCHRUN.items() if name != missing})


@pytest.mark.parametrize(("name", "value"), [("RANK", "8"), ("WORLD_SIZE", "x"), ("RANK", "-1")])
def test_numbers_that_make_no_sense_are_refused(name: str, value: str) -> None:
    with pytest.raises(UserError, match=name):
        who_am_i({**TORCHRUN, name: value})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[1-4]", "n1"), ("gpu[07,09-11],x", "gpu07"), ("r[2-3]-ib,z", "r2-ib")],
)
def test_the_first_of_a_node_list_is_where_ranks_meet(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
