"""A preparation that is interrupted, shared or repeated: the output is the same, and there whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from megalm.data.counts import SkipLimit
from megalm.data.prepare import Progress, Report, Settings, prepare
from megalm.data.share import Share
from megalm.data.train_tokenizer import train_tokenizer
from megalm.errors import UserError

SETTINGS = Settings(unit_bytes=20_000)
KILLS = 20


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of six files, about two units each."""
    (tmp_path / "in").mkdir()
    for i in range(6):
        write_lines(tmp_path / "in" / f"{i}.jsonl", [f"document {i}.{j}: {'word ' * (j % 60)}" for j in range(200)])
    return tmp_path / "in"


def run(corpus: Path, name: str = "out", settings: Settings = SETTINGS, **options: object) -> Report:
    return prepare([corpus], "byte", corpus.parent / name, settings, **options)  # type: ignore[arg-type]


class Stopped(Exception):
    pass


def interrupted(corpus: Path, after: int = 3, **options: object) -> None:
    """A run that stops in the unit after the first `after` ones."""

    def stop(at: Progress) -> None:
        if len(list((corpus.parent / ".out.work" / "units").glob("*.json"))) >= after:
            raise Stopped

    with pytest.raises(Stopped):
        run(corpus, on_progress=stop, **options)
    assert len(list((corpus.parent / ".out.work" / "units").iterdir())) == after


# --- going on


def test_the_next_run_does_what_is_missing_and_no_more(corpus: Path) -> None:
    whole = run(corpus, "whole")
    assert whole.units > 10
    interrupted(corpus)
    assert not (corpus.parent / "out").exists()
    report = run(corpus)
    assert content(corpus.parent / "out") == content(corpus.parent / "whole")
    assert 0 < report.done_before < report.input_bytes
    assert report.sources == whole.sources
    assert sorted(os.listdir(corpus.parent)) == ["in", "out", "whole"]


def test_the_same_command_after_the_end_has_nothing_to_do(corpus: Path) -> None:
    first = run(corpus)
    times = {path: path.stat().st_mtime_ns for path in (corpus.parent / "out").iterdir()}
    for overwrite in (False, True):
        again = run(corpus, overwrite=overwrite)
        assert (again.manifest, again.sources, again.done_before) == (first.manifest, first.sources, again.input_bytes)
    assert {path: path.stat().st_mtime_ns for path in (corpus.parent / "out").iterdir()} == times
    assert sorted(os.listdir(corpus.parent)) == ["in", "out"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, path.stat().st_size - 2)])
def test_an_output_that_lacks_something_is_not_taken_for_the_end(corpus: Path, damage: Callable[[Path], None]) -> None:
    run(corpus)
    whole = content(corpus.parent / "out")
    damage(corpus.parent / "out" / "shard-00001.bin")
    with pytest.raises(UserError, match="written already"):
        run(corpus)
    assert run(corpus, overwrite=True).done_before == 0
    assert content(corpus.parent / "out") == whole


def touched(corpus: Path) -> None:
    path = corpus / "0.jsonl"
    path.write_bytes(path.read_bytes())


def appended(corpus: Path) -> None:
    with (corpus / "5.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')


def replaced(corpus: Path) -> None:  # by one of the same size
    path = corpus / "0.jsonl"
    path.write_text(path.read_text().replace("document", "DOCUMENT"))


@pytest.mark.parametrize("change", [appended, replaced, touched])
def test_units_of_files_that_changed_are_done_again(corpus: Path, change: Callable[[Path], None]) -> None:
    interrupted(corpus)
    change(corpus)
    report = run(corpus)
    assert 0 < report.done_before < report.input_bytes
    run(corpus, "whole")
    assert content(corpus.parent / "out") == content(corpus.parent / "whole")


def test_no_unit_is_used_of_other_settings_or_another_tokenizer(corpus: Path) -> None:
    train_tokenizer("bpe", 300, [corpus], corpus.parent / "tokenizer")
    others: list[Callable[[str], Report]] = [
        lambda name: run(corpus, name, Settings(unit_bytes=20_000, shuffle=False)),
        lambda name: run(corpus, name, Settings(unit_bytes=20_000, append_eod=False)),
        lambda name: run(corpus, name, Settings(unit_bytes=30_000)),
        lambda name: prepare([corpus], str(corpus.parent / "tokenizer"), corpus.parent / name, SETTINGS),
        lambda name: prepare([corpus / "3.jsonl"], "byte", corpus.parent / name, SETTINGS),
    ]
    for number, other in enumerate(others):
        interrupted(corpus)
        assert other("out").done_before == 0
        other(f"whole-{number}")
        assert content(corpus.parent / "out") == content(corpus.parent / f"whole-{number}")
        shutil.rmtree(corpus.parent / "out")


def test_what_the_dead_left_behind_is_swept(corpus: Path) -> None:
    interrupted(corpus)
    work = corpus.parent / ".out.work"
    for name in (
        "data/.shard-00003.bin.tmp-1",
        "data/shard-00003.bin",
        "data/shard-00099.idx",
        "units/.00003.json.tmp-1",
    ):
        (work / name).write_bytes(b"half")
    (work / "units" / "00001.json").write_bytes(b'{"key": "')
    (work / "data" / "shard-00002.bin").unlink()
    run(corpus)
    run(corpus, "whole")
    assert content(corpus.parent / "out") == content(corpus.parent / "whole")
    assert sorted(os.listdir(corpus.parent)) == ["in", "out", "whole"]


def test_a_run_killed_while_it_replaced_the_output_has_lost_nothing(corpus: Path) -> None:
    first = run(corpus)
    out, old = corpus.parent / "out", corpus.parent / ".out.old"
    out.rename(old)  # killed after the first of two renames
    appended(corpus)
    with pytest.raises(UserError, match="written already"):
        run(corpus)
    assert first.manifest is not None
    assert len(content(out)) == 2 * len(first.manifest.shards) + 2
    shutil.copytree(out, old)  # killed after the second
    run(corpus, overwrite=True)
    assert sorted(os.listdir(corpus.parent)) == ["in", "out"]


# --- kills


def start(corpus: Path, *more: object) -> subprocess.Popen[bytes]:
    """The same as `run(corpus, workers=2)`, slow, in a process group of its own."""
    script = corpus.parent / "script.py"
    script.write_text(f"""
import sys
from pathlib import Path
from megalm.data.prepare import Settings, prepare
if __name__ == "__main__":
    prepare([Path({str(corpus)!r})], {str(corpus.parent / "tokenizer")!r}, Path({str(corpus.parent / "out")!r}),
            Settings(unit_bytes=40_000), workers=2, engine="reference")
""")
    return subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, start_new_session=True)


@pytest.fixture
def slow_corpus(tmp_path: Path) -> Path:
    """Some fourteen units a kill, which take two seconds or more to encode."""
    (tmp_path / "in").mkdir()
    words = [f"word{i * 7919 % 10007}" for i in range(20_000)]
    for i in range(4):
        texts = [" ".join(words[i + 80 * j % 10_000 :][:800]) for j in range(20 * KILLS)]
        write_lines(tmp_path / "in" / f"{i}.jsonl", texts)
    train_tokenizer("bpe", 300, [tmp_path / "in" / "0.jsonl"], tmp_path / "tokenizer")
    return tmp_path / "in"


def records(corpus: Path) -> dict[str, int]:
    """The records of finished units, and when each was written."""
    found = {}
    for path in (corpus.parent / ".out.work" / "units").glob("0*.json"):
        with suppress(FileNotFoundError):
            found[path.name] = path.stat().st_mtime_ns
    return found


def wait_for_units(corpus: Path, count: int, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 60
    while len(records(corpus)) < count and (process is None or process.poll() is None):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def alive(group: int) -> list[str]:
    """The processes of a group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                found.append(stat.parent.name)
    return found


@contextmanager
def killed_at_the_end(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_kills_at_random_moments_do_not_change_the_output(slow_corpus: Path) -> None:
    settings = Settings(unit_bytes=40_000)
    whole = prepare([slow_corpus], str(slow_corpus.parent / "tokenizer"), slow_corpus.parent / "whole", settings)
    assert whole.units > 12 * KILLS
    draw = random.Random(0)
    before: dict[str, int] = {}
    for kill in range(KILLS):
        process = start(slow_corpus)
        with killed_at_the_end(process):
            if kill:  # the first comes at any time, while it starts or works
                wait_for_units(slow_corpus, len(before) + draw.randint(1, 3), process)
            assert process.poll() is None, process.communicate()
            time.sleep(draw.uniform(0, 0.03 if kill else 0.6))
            # Sometimes the workers are left to find out for themselves.
            os.kill(process.pid, signal.SIGKILL) if kill % 2 else os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            after = records(slow_corpus)
            assert before.items() <= after.items(), "what was done was not done again"
            before = after
    assert len(before) >= KILLS - 1, "the kills came while units were being done"
    assert not (slow_corpus.parent / "out").exists()
    process = start(slow_corpus)
    with killed_at_the_end(process):
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, b"")
    assert content(slow_corpus.parent / "out") == content(slow_corpus.parent / "whole")
    assert not [name for name in os.listdir(slow_corpus.parent) if name.startswith(".")]


def test_a_worker_that_is_killed_ends_the_command_and_its_work_is_kept(slow_corpus: Path) -> None:
    failures: list[UserError] = []
    settings = Settings(unit_bytes=40_000)
    output = slow_corpus.parent / "out"

    def command(workers: int) -> None:
        prepare(
            [slow_corpus], str(slow_corpus.parent / "tokenizer"), output, settings, workers=workers, engine="reference"
        )

    def failing() -> None:
        try:
            command(2)
        except UserError as error:
            failures.append(error)

    others = multiprocessing.active_children()
    thread = threading.Thread(target=failing)
    thread.start()
    wait_for_units(slow_corpus, 3)
    victim = next(child for child in multiprocessing.active_children() if child not in others)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    thread.join(60)
    assert not thread.is_alive()
    (failure,) = failures
    assert "a worker process was killed by SIGKILL: if memory is short" in str(failure)
    assert f"units are kept in {output.with_name('.out.work')}: the same command, run again, goes on" in str(failure)
    assert set(multiprocessing.active_children()) <= set(others)
    assert not output.exists()
    command(1)
    assert output.exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_told_to_stop_leaves_nobody(slow_corpus: Path, number: signal.Signals, code: int) -> None:
    arguments = ["data", "prepare", "--workers", "2", "--engine", "reference"]
    paths = ["--input", slow_corpus, "--tokenizer", slow_corpus.parent / "tokenizer"]
    command = ["-c", "import sys; from megalm.cli import main; sys.exit(main())", *arguments]
    process = subprocess.Popen(
        [sys.executable, *command, *map(str, paths), "--output", str(slow_corpus.parent / "out")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with killed_at_the_end(process):
        deadline = time.monotonic() + 60
        while not list((slow_corpus.parent).glob(".out.work/data/.shard-*")):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert b"Traceback" not in errors
        assert process.returncode == code
        assert alive(process.pid) == []
    assert sorted(os.listdir(slow_corpus.parent)) == ["in", "tokenizer"], "no unit was done: there is nothing to keep"


def test_workers_end_when_the_command_is_killed(slow_corpus: Path) -> None:
    process = start(slow_corpus)
    with killed_at_the_end(process):
        wait_for_units(slow_corpus, 1)
        process.kill()
        process.communicate(timeout=60)
        deadline = time.monotonic() + 60
        while alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert alive(process.pid) == []


# --- several commands


def nested(corpus: Path, inner: Callable[[], object], **options: object) -> tuple[Report, list[object]]:
    """Runs `inner` while another preparation is in the middle of its work; gives what both came to."""
    results: list[object] = []

    def on_progress(at: Progress) -> None:
        if at.done > 0 and not results:
            try:
                results.append(inner())
            except UserError as error:
                results.append(str(error))

    return run(corpus, on_progress=on_progress, **options), results


def test_of_two_commands_on_one_output_the_second_is_refused(corpus: Path) -> None:
    for settings, reason in (
        (SETTINGS, "the same command is at work on it already"),
        (Settings(unit_bytes=10_000), "a command with other inputs or settings is at work on it"),
    ):
        report, (refusal,) = nested(corpus, lambda settings=settings: run(corpus, settings=settings))
        assert reason in str(refusal)
        assert "kept in" not in str(refusal)
        run(corpus, "whole")
        assert report.manifest is not None
        assert content(corpus.parent / "out") == content(corpus.parent / "whole")
        shutil.rmtree(corpus.parent / "out")


@pytest.mark.parametrize("world_size", [2, 3, 40])
def test_the_output_does_not_depend_on_how_many_commands_share_the_work(corpus: Path, world_size: int) -> None:
    run(corpus, "whole")
    ranks = list(range(world_size))
    random.Random(world_size).shuffle(ranks)
    last = max(ranks.index(rank) for rank in ranks if rank < 13)  # others of 40 have no unit
    for place, rank in enumerate(ranks):
        report = run(corpus, share=Share(rank, world_size))
        assert (report.manifest is not None) == (place >= last)
        assert (corpus.parent / "out").exists() == (place >= last)
        if place < last:
            assert report.units_done < report.units
    assert content(corpus.parent / "out") == content(corpus.parent / "whole")
    assert run(corpus, share=Share(0, world_size)).manifest is not None, "a rank that is run again finds all done"
    assert sorted(os.listdir(corpus.parent)) == ["in", "out", "whole"]


def test_ranks_may_be_at_work_together_but_each_only_once(corpus: Path) -> None:
    inner, (refusal,) = nested(corpus, lambda: run(corpus, share=Share(0, 2)), share=Share(0, 2))
    assert "rank 0 of the same command is at work on it already" in str(refusal)
    assert inner.manifest is None
    outer, (joined,) = nested(corpus, lambda: run(corpus, share=Share(2, 3)), share=Share(1, 3))
    assert isinstance(joined, Report)
    assert (outer.manifest, joined.manifest) == (None, None)
    report = run(corpus, share=Share(0, 3))
    assert report.manifest is not None
    run(corpus, "whole")
    assert content(corpus.parent / "out") == content(corpus.parent / "whole")


def test_the_last_rank_holds_all_of_them_to_the_limit(corpus: Path) -> None:
    with (corpus / "0.jsonl").open("a") as file:
        file.write("{\n" * 5)
    share = SkipLimit(share=0.001, count=0)
    assert run(corpus, share=Share(0, 2), limit=share).manifest is None
    with pytest.raises(UserError, match="5 of 1205 records are faulty"):
        run(corpus, share=Share(1, 2), limit=share)
    assert run(corpus, share=Share(1, 2)).manifest is not None
