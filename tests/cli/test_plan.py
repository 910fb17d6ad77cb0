"""`megalm plan schedule`: the numbers, the pictures, and a run's own timeline beside them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.cli import main
from megalm.parallel.pipeline.plan import placement_of
from megalm.parallel.pipeline.schedules import compute_orders
from megalm.parallel.pipeline.simulate import Costs, simulate


def record(run: Path, slower: float = 1.0) -> None:
    """The timeline of a run whose stages cost 2, 3 and 1 ms, its step `slower` than a plan with these costs."""
    placement = placement_of("zbv", 2, 2)
    costs = Costs.uniform(4, 0.002, 0.003, 0.001, 0.0005)
    ranks = simulate(compute_orders("zbv", placement, 6), placement, costs).ranks
    zero = 5.0
    rows = [
        [{"action": str(a), "start": zero + s * slower, "end": zero + s * slower + e - s} for a, s, e in rank]
        for rank in ranks
    ]
    content = {
        "schedule": "zbv",
        "placement": placement,
        "layers": [1] * len(placement),
        "micro_batches": 6,
        "ranks": rows,
        "bytes": 24_000_000,
    }
    (run / "timeline.json").write_text(json.dumps(content))


def test_bubble_floor_memory_and_messages_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--pipeline", "4", "--micro-batches", "8", "--schedule", "zb-h1", "--costs", "1,1.2,0.8,0"]
    assert main(["plan", "schedule", *options, "--message-size", "1000000"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"zb-h1 +28\.2 +4\.2 +17\.5% +3 +4 4 4 4", out)
    assert "48 messages between ranks, 48 MB" in out
    rows = [line for line in out.splitlines() if line.startswith("rank")]
    assert len(rows) == 4
    assert rows[0].startswith("rank 0   F0--F1---F2--F3--....")
    assert rows[3].startswith("rank 3   .............F0")


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", "1"), ("zbv", "2"), ("interleaved", "3")])
def test_the_memory_of_schedules_is_in_micro_batches_of_a_rank_whatever_its_chunks(
    schedule: str, chunks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--pipeline", "4", "--micro-batches", "12", "--schedule", schedule, "--chunks", chunks]
    assert main(["plan", "schedule", *options]) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == [schedule]]
    least = max(map(float, row.split()[-4:]))
    assert 4 <= least <= 6  # all of the pipeline's fill, and in the interleaved order some more
    assert main(["plan", "schedule", *options, "--memory-cap", str(least + 1e-5)]) == 0
    assert main(["plan", "schedule", *options, "--memory-cap", str(least - 0.1)]) == 2


@pytest.mark.parametrize("name", ["gantt.png", "gantt.svg", "gantt.txt"])
def test_pictures_are_written(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "schedule", "--schedule", "auto", "--pipeline", "2", "--output", str(tmp_path / name)]) == 0
    content = (tmp_path / name).read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "txt": b"auto, 16 micro"}[name[-3:]])
    assert "rank 0" not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_a_recorded_step_is_compared_and_planned_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path)
    assert main(["plan", "schedule", "--from-run", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = {line.split("  ")[0].strip(): line for line in out.splitlines() if re.search(r"%", line)}
    assert list(rows)[:4] == ["zbv, as it ran", "zbv", "dualpipev", "auto"]
    assert rows["zbv, as it ran"].split()[4:] == rows["zbv"].split()[1:]
    assert re.search(r" s, 0\.0% (less|more) than simulated; 24 MB sent between ranks", out)
    record(tmp_path, slower=1.1)
    assert main(["plan", "schedule", "--from-run", str(tmp_path), "--output", str(tmp_path / "real.svg")]) == 0
    assert re.search(r"The step took 0\.0\d+ s, \d\.\d% more than simulated", capsys.readouterr().out)
    assert (tmp_path / "real.svg").read_bytes().count(b"as it ran") == 1  # as a comment: letters are drawn as paths


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--schedule=zbw", "--schedule=zbw is no schedule. Did you mean 'zbv'? They are gpipe, 1f1b,"),
        ("--schedule=zbv --chunks=3", "--chunks=3 does not fit --schedule=zbv, which has 2: leave it out"),
        ("--pipeline=1 --chunks=2", "--chunks=2 has no meaning with --pipeline=1: leave it out"),
        ("--costs=1,2", "--costs=1,2: give four numbers, F,I,W,COMM, such as 1,1.2,0.8,0.05; the first three above 0"),
        ("--costs=1,0,1,0", "--costs=1,0,1,0: give four numbers"),
        ("--costs=1,nan,1,0", "--costs=1,nan,1,0: give four numbers"),
        ("--costs=1,1,inf,0", "--costs=1,1,inf,0: give four numbers"),
        ("--output=plan.pdf", "--output=plan.pdf: ends in none of .png, .svg and .txt: choose one of them"),
        ("--costs=1e-320,1,1,0", "--costs=1e-320,1,1,0: give four numbers"),
        ("--pipeline=99999999999999999999", "a step of more than 2,000,000 actions with --schedule=1f1b: choose less"),
        (
            "--memory-cap=2",
            "parallel.pipeline.schedule=1f1b: a rank's activations take 4 at once, more than the cap of 2",
        ),
        (
            "--schedule=auto --micro-batches=99999",
            "more than 100,000 actions with --schedule=auto: choose less",
        ),
        ("--output=nowhere/plan.png", "--output=nowhere/plan.png: there is no directory nowhere: make it first"),
        ("--from-run=. --costs=1,1,1,0", "--costs has no meaning with --from-run, which has recorded it: leave it out"),
        ("--from-run=. --pipeline=4", "--pipeline has no meaning with --from-run"),
        ("--from-run=.", "timeline.json does not exist: train with log.timeline=true, which records a step"),
    ],
)
def test_mistakes_are_one_line(
    options: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "schedule", *options.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("megalm: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"ranks": [[{"action": "X", "start": 0, "end": 1}]]}', '{"ranks": []}']
)
def test_a_file_that_is_no_timeline_is_a_mistake(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "timeline.json").write_text(content)
    assert main(["plan", "schedule", "--from-run", str(tmp_path)]) == 2
    assert re.match(
        r"megalm: error: .*timeline\.json is no timeline of a run \(.*\): train again", capsys.readouterr().err
    )


def test_planning_does_not_wait_for_torch() -> None:
    script = (
        "import sys; from megalm.cli import main; code = main(['plan', 'schedule', '--schedule', 'zbv']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL, check=False).returncode == 0
