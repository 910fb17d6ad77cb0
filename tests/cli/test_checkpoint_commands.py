"""`megalm checkpoint`, and a run whose checkpoints are damaged or elsewhere."""

from __future__ import annotations

import errno
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO
from uuid import uuid4

import pytest
import torch
from ranks import run_ranks
from runs import losses, write_config

from megalm.checkpoint import DamagedCheckpoint, Shard, load, save, writer
from megalm.checkpoint.inspect import problems
from megalm.checkpoint.places import writing
from megalm.cli import main
from megalm.launch.slurm import SAVED

OVERRIDES = ["schedule={steps: 20}", "checkpoint={every: 5, keep: 3}", "evaluate.every=20"]


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    run = data / "commands"
    assert main(["train", write_config(data, run), *OVERRIDES]) == 0
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step-{number:08d}"


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def flip(path: Path, position: int = -100) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def said(capsys: pytest.CaptureFixture[str], code: int, *arguments: str | Path) -> str:
    capsys.readouterr()
    assert main(["checkpoint", *map(str, arguments)]) == code
    printed = capsys.readouterr()
    assert printed.err.count("\n") == (1 if code else 0)
    return printed.out + printed.err


def test_verify_reads_every_byte_of_all_of_a_runs_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, 0, "verify", run)
    assert out.count("intact") == 3
    flip(step(run, 15) / "rank-00000.safetensors")
    out = said(capsys, 2, "verify", run)
    assert out.count("intact") == 2
    assert f"error: {step(run, 15)}/rank-00000.safetensors: tensor '" in out
    assert said(capsys, 0, "verify", step(run, 20)).count("intact") == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def exchange(path: Path) -> None:
    other = path.parents[1] / "step-00000015" / path.name
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut, "bytes, but the manifest says"),
        (Path.unlink, "is missing"),
        (exchange, "does not match its checksum"),
        (lambda path: path.with_name("foreign.bin").touch(), "foreign.bin: is no part of this checkpoint"),
    ],
    ids=["cut", "missing", "of another step", "foreign"],
)
def test_verify_names_what_is_wrong_with_a_file(
    run: Path, harm: Callable[[Path], None], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(step(run, 20) / "rank-00000.safetensors")
    assert words in said(capsys, 2, "verify", step(run, 20))


SHAPE = 96, 40


def halves(fill: float) -> list[Shard]:
    import torch.distributed as dist

    rank = dist.get_rank()
    tensor = torch.full((32, 40), fill) + torch.arange(40)
    return [Shard(name, tensor, SHAPE, (32 * rank, 0), (32, 40)) for name in ("a", "b")]


def save_thirds(root: Path) -> None:
    import torch.distributed as dist

    save(root, 1, halves(1.0), {"some": "state"}, 1, dist.group.WORLD)


def test_a_checkpoint_that_is_named_for_another_step_is_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step(run, 20).rename(step(run, 30))
    assert "manifest.json: of step 20" in said(capsys, 2, "verify", run)


def test_a_hundred_random_bit_flips_are_all_found_before_anything_changes(tmp_path: Path) -> None:
    run_ranks(3, save_thirds, tmp_path)
    directory = tmp_path / "step-00000001"
    files = sorted(directory.iterdir())
    assert len(files) == 4
    dice = random.Random(17)
    for _ in range(100):
        path = dice.choice(files)
        intact = path.read_bytes()
        damaged = bytearray(intact)
        damaged[dice.randrange(len(damaged))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        assert any(path.name in problem for problem in problems(directory))
        into = [Shard(name, torch.zeros(SHAPE), SHAPE, (0, 0), SHAPE) for name in ("a", "b")]
        with pytest.raises(DamagedCheckpoint, match=path.name):
            load(directory, into)
        assert not any(shard.tensor.any() for shard in into)
        path.write_bytes(intact)
    assert not problems(directory)


def test_inspect_shows_where_a_run_is_and_what_is_in_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, 0, "inspect", run, "--tensors")
    manifest = json.loads((step(run, 20) / "manifest.json").read_text())
    size = sum(file["size"] for file in manifest["files"].values())
    assert manifest["state"]["position"]["data_hash"] in out
    assert f"{manifest['state']['position']['tokens']:,}" in out
    assert f"{size / 1e6:.3g} MB" in out or f"{size / 1e3:.3g} kB" in out
    assert all(name in out for name in manifest["tensors"])


def test_diff_says_how_far_two_checkpoints_are_apart(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "0 of " in said(capsys, 0, "diff", run, step(run, 20))
    out = said(capsys, 0, "diff", step(run, 15), run)
    assert "position.step: 15 -> 20" in out
    tensors = json.loads((step(run, 20) / "manifest.json").read_text())["tensors"]
    name = next(name for name, tensor in tensors.items() if "model." in name and tensor["shape"] == [32])
    values = []
    for number in (15, 20):
        (shard,) = [Shard(name, torch.zeros(32), (32,), (0,), (32,))]
        load(step(run, number), [shard], prefix=name)
        values.append(shard.tensor)
    apart = (values[0].double() - values[1].double()).abs().max()
    assert f"{name}: 32 of 32 differ, by at most {apart:.3g}" in out


def test_prune_deletes_the_old_ones_and_first_says_which(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "would be deleted: step 10, step 15" in said(capsys, 0, "prune", run, "--keep", "1", "--dry-run")
    assert "is one checkpoint: name its run's directory" in said(capsys, 2, "prune", step(run, 10), "--keep", "1")
    assert steps(run) == [10, 15, 20]
    assert "deleted: step 15" in said(capsys, 0, "prune", run, "--keep", "1", "--keep-every", "10")
    assert steps(run) == [10, 20]


def test_prune_counts_no_damaged_one_as_kept(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(step(run, 20) / "rank-00000.safetensors")
    assert "none" in said(capsys, 0, "prune", run, "--keep", "2")
    assert steps(run) == [10, 15, 20]


def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["inspect"], ["verify"], ["prune", "--keep", "1"]):
        assert str(tmp_path / "nowhere") in said(capsys, 2, *command, tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_a_file_that_belongs_to_no_checkpoint_is_named_and_left_alone(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (foreign := step(run, 20) / "evil.safetensors").touch()
    assert main(["train", write_config(data, run), *OVERRIDES, "schedule.steps=21"]) == 0
    assert f"{foreign}: is no part of this checkpoint; it was left alone" in (run / "train.log").read_text()
    assert foreign.exists()


@pytest.mark.parametrize("policy", ["fallback", "refuse"])
@pytest.mark.parametrize("file", ["rank-00000.safetensors", "manifest.json"])
def test_a_damaged_newest_checkpoint_is_passed_over_or_refused_as_asked(
    data: Path, trained: Path, tmp_path: Path, policy: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    flip(step(run, 20) / file)
    before = losses(run)
    code = main(["train", write_config(data, run), *OVERRIDES, f"checkpoint.on_corrupt={policy}"])
    error = capsys.readouterr().err
    assert file in error + (run / "train.log").read_text()
    if policy == "fallback":
        assert code == 0
        assert losses(run) == before
        assert "trying the one before" in (run / "train.log").read_text()
        assert main(["checkpoint", "verify", str(run)]) == 0
    else:
        assert code == 2
        assert "checkpoint.on_corrupt=fallback" in error
        assert losses(run) == before
        assert main(["checkpoint", "verify", str(step(run, 20))]) == 2


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(
    data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in steps(run):
        flip(step(run, number) / "manifest.json")
    before = losses(run)
    assert main(["train", write_config(data, run), *OVERRIDES]) == 2
    assert "no checkpoint is intact" in capsys.readouterr().err
    assert losses(run) == before


@pytest.mark.parametrize("where", ["directory", "memory"])
def test_checkpoints_may_lie_elsewhere(
    data: Path, trained: Path, tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    path = str(tmp_path / "elsewhere") if where == "directory" else f"memory://{uuid4().hex}"
    config = write_config(data, run)
    overrides = [*OVERRIDES, f"checkpoint.path={path}", f"checkpoint.asynchronous={str(where == 'memory').lower()}"]
    for last in (15, 20):  # it goes on from there
        assert main(["train", config, *overrides, f"schedule.steps={last}"]) == 0
    log = (run / "train.log").read_text()
    assert "continuing from " in log
    assert f"{SAVED} 20, " in log  # what a batch script looks for
    assert not (run / "checkpoints").exists()
    assert f"{20 * 8 * 64:,}" in said(capsys, 0, "inspect", run)
    assert said(capsys, 0, "verify", path).count("intact") == 3
    assert main(["generate", str(run), "--prompt", "a", "--max-new-tokens", "3"]) == 0


def test_a_place_that_nothing_reaches_is_refused_before_work_starts(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(data, tmp_path / "run")
    assert main(["train", config, "checkpoint.path=nosuch://x", "--dry-run"]) == 2
    assert "checkpoint.path=nosuch://x" in capsys.readouterr().err


def test_a_save_that_is_due_while_another_is_written_waits_for_it_and_says_so_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def slowly(path: Path) -> Iterator[IO[bytes]]:
        time.sleep(0.8)
        with writing(path) as file:
            yield file

    monkeypatch.setattr(writer, "writing", slowly)
    run = tmp_path / "run"
    overrides = ["schedule={steps: 4}", "checkpoint={every: 1, keep: 9}"]
    assert main(["train", write_config(data, run), *overrides]) == 0
    assert (run / "train.log").read_text().count("checkpoint.every=1 is too often") == 1
    assert steps(run) == [1, 2, 3, 4]
    assert main(["checkpoint", "verify", str(run)]) == 0


def test_what_is_saved_is_of_its_step_however_slow_the_copy_is(
    data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = writer.copy_boxes

    def slowly(*boxes: Sequence[Shard]) -> None:
        time.sleep(0.5)
        copy(*boxes)

    monkeypatch.setattr(writer, "copy_boxes", slowly)
    run = tmp_path / "run"
    assert main(["train", write_config(data, run), *OVERRIDES]) == 0
    for number in steps(run):
        assert "\n0 of " in "\n" + said(capsys, 0, "diff", step(run, number), step(trained, number))


def test_a_run_whose_background_write_fails_ends_in_one_line_with_what_was_there(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path) -> AbstractContextManager[IO[bytes]]:
        if "step-00000010" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return writing(path)

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(writer, "writing", full)
        assert main(["train", write_config(data, run), *OVERRIDES]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{step(run, 10)}: cannot write a checkpoint" in last
    assert "No space left on device; earlier ones are intact" in last
    assert steps(run) == [5]
    assert main(["train", write_config(data, run), *OVERRIDES]) == 0
    assert steps(run) == [10, 15, 20]
