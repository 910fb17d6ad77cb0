from __future__ import annotations

import grp
import os
import stat
from pathlib import Path

import pytest
from runs import write_config

from megalm.cli import main

SHORT = ["schedule={steps: 2}", "checkpoint.every=1"]


def modes(run: Path) -> set[str]:
    return {stat.filemode(path.stat().st_mode) for path in [run, *run.rglob("*")]}


def test_what_a_run_writes_is_for_its_owner_alone_and_the_umask_is_as_before(data: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        assert main(["train", write_config(data, tmp_path / "run"), *SHORT]) == 0
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    assert modes(tmp_path / "run") == {"drwx------", "-rw-------"}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, who is in every group")
def test_a_group_may_read_what_a_run_writes_if_the_config_says_so(data: Path, tmp_path: Path) -> None:
    group = next(entry for entry in grp.getgrall() if entry.gr_gid != os.getegid())
    run = tmp_path / "run"
    assert main(["train", write_config(data, run), *SHORT, f"run.group={group.gr_name}"]) == 0
    assert modes(run) == {"drwxr-s---", "-rw-r-----"}
    assert {path.stat().st_gid for path in [run, *run.rglob("*")]} == {group.gr_gid}


def test_a_group_that_is_not_there_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", write_config(data, tmp_path / "run"), "run.group=no-such-group"]) == 2
    assert "run.group=no-such-group: there is no such group on" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
