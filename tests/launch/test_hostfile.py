from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalm.errors import UserError
from megalm.launch.hostfile import read_hostfile, read_variables, selected

NAMES = st.lists(st.from_regex(r"[a-z][a-z0-9.-]{0,8}", fullmatch=True), min_size=1, max_size=5, unique=True)


@st.composite
def pools(draw: st.DrawFn) -> tuple[str, str]:
    """A hostfile, and hosts and processes chosen from it."""
    slots = {name: draw(st.integers(1, 9)) for name in draw(NAMES)}
    noise = st.sampled_from(["", "\n", "# a comment slots=4\n", "   \n"])
    text = "".join(f"{draw(noise)}{name} \t slots={count}  max_slots=9\n" for name, count in slots.items())
    chosen = draw(st.lists(st.sampled_from(list(slots)), min_size=1, unique=True))
    parts = []
    for name in chosen:
        numbers = draw(st.lists(st.integers(0, slots[name] - 1), unique=True))
        parts.append(f"{name}:{','.join(map(str, numbers))}" if numbers else name)
    return text, "@".join(parts)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pools())
def test_hosts_and_filters_mean_what_deepspeed_takes_them_for(tmp_path: Path, pool: tuple[str, str]) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    (tmp_path / "hosts").write_text(pool[0])
    theirs, ours = runner.fetch_hostfile(str(tmp_path / "hosts")), read_hostfile(tmp_path / "hosts")
    assert list(ours.items()) == [(name, list(range(count))) for name, count in theirs.items()]
    included = runner.parse_inclusion_exclusion(theirs, pool[1], "")
    assert list(selected(ours, include=pool[1]).items()) == list(included.items())
    if excluded := runner.parse_inclusion_exclusion(theirs, "", pool[1]):
        assert list(selected(ours, exclude=pool[1]).items()) == list(excluded.items())
    else:
        with pytest.raises(UserError, match="leaves no host"):
            selected(ours, exclude=pool[1])
    assert selected(ours) == ours


def test_variables_of_the_working_directory_win_and_blank_lines_and_comments_are_passed_over(tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for folder, text in ((home, "A=1\nB = $(touch x)\n"), (here, "\n# of this run\nA='2 3'\n\nC=a=b\n")):
        folder.mkdir()
        (folder / ".deepspeed_env").write_text(text)
    assert read_variables({}, home, here) == {"A": "2 3", "B": "$(touch x)", "C": "a=b"}
    assert read_variables({"DS_ENV_FILE": "other"}, home, here) == {}


def test_a_secret_that_others_may_read_is_refused_and_not_shown(tmp_path: Path) -> None:
    path = tmp_path / ".deepspeed_env"
    path.write_text("WANDB_API_KEY=hush\n")
    path.chmod(0o644)
    with pytest.raises(UserError, match="WANDB_API_KEY and may be read by others: chmod 600") as error:
        read_variables({}, tmp_path, Path(os.devnull))
    assert "hush" not in str(error.value)
    path.chmod(0o600)
    assert read_variables({}, tmp_path, Path(os.devnull)) == {"WANDB_API_KEY": "hush"}


def test_the_examples_are_what_they_seem() -> None:
    examples = Path(__file__).parents[2] / "examples"
    hosts = read_hostfile(examples / "hostfile")
    assert {name: len(slots) for name, slots in hosts.items()} == {"node1": 8, "node2": 8}
    assert read_variables({}, examples, examples)["NCCL_DEBUG"] == "WARN"
