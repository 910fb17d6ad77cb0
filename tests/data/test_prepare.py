"""`megalm data prepare` and `inspect`, through the command line."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from megalm.cli import main
from megalm.data.indexed import open_shard
from megalm.data.inspect import samples
from megalm.data.manifest import Manifest
from megalm.data.prepare import SkipLimit, prepare
from megalm.data.tokenizer import load_tokenizer
from megalm.data.train_tokenizer import train_tokenizer
from megalm.errors import UserError


def write_lines(path: Path, texts: list[str], faulty: tuple[bytes, ...] = ()) -> Path:
    content = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    path.write_bytes(content + b"".join(line + b"\n" for line in faulty))
    return path


def run(*arguments: object) -> int:
    return main(["data", *map(str, arguments)])


def arguments(tmp_path: Path, *more: object) -> list[object]:
    return ["prepare", "--input", tmp_path / "in", "--tokenizer", "byte", "--output", tmp_path / "out", *more]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command fails with."""
    capsys.readouterr()
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("megalm: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def documents(directory: Path) -> list[str]:
    """All documents, decoded by walking the shards by hand."""
    manifest = Manifest.load(directory)
    tokenizer = load_tokenizer(manifest.tokenizer.path)
    texts = []
    for shard in manifest.shards:
        reader = open_shard(directory, manifest, shard)
        tokens = reader.read(0, reader.tokens)
        reader.verify()
        ends = np.flatnonzero(tokens == tokenizer.eod)
        assert ends.tolist() == (np.cumsum(reader.lengths()) - 1).tolist(), "each document ends with the token for it"
        texts += [
            tokenizer.decode(tokens[start : end + 1]) for start, end in zip([0, *ends[:-1] + 1], ends, strict=True)
        ]
    return texts


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """A folder `in` with a file of each kind, and the documents in it."""
    texts = [f"document {i}: " + "né 日本 😀\n\t" * (i % 7 + 1) for i in range(40)]
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    write_lines(folder / "a.jsonl", texts[:30])
    packed = write_lines(folder / "deep" / "b.jsonl", texts[30:38])
    (folder / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    (folder / "c.txt").write_text(texts[38])
    (folder / "d.txt").write_text(texts[39])
    return texts


@pytest.mark.parametrize("kind", ["byte", "sentencepiece", "bpe"])
def test_every_document_is_there_once_and_the_manifest_counts_them(
    tmp_path: Path, corpus: list[str], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = "byte"
    if kind != "byte":
        path = str(tmp_path / "tokenizer")
        train_tokenizer(kind, 290, [tmp_path / "in"], Path(path))
    assert run("prepare", "--input", tmp_path / "in", "--tokenizer", path, "--output", tmp_path / "out") == 0
    found = documents(tmp_path / "out")
    assert sorted(found) == sorted(corpus)
    assert found != corpus, "documents are shuffled"
    manifest = Manifest.load(tmp_path / "out")
    tokenizer = load_tokenizer(path)
    assert manifest.documents == len(corpus)
    assert manifest.text_bytes == sum(len(text.encode()) for text in corpus)
    assert manifest.tokens == sum(len(tokenizer.encode(text)) + 1 for text in corpus)
    assert (manifest.tokenizer.kind, manifest.tokenizer.fingerprint) == (kind, tokenizer.fingerprint)
    assert (manifest.tokenizer.vocab_size, manifest.tokenizer.eod) == (tokenizer.vocab_size, tokenizer.eod)
    assert manifest.tokenizer.path == path
    shown = capsys.readouterr().out
    for value in (f"{manifest.documents:,}", f"{manifest.tokens:,}"):
        assert value in shown
    assert run("inspect", tmp_path / "out", "--samples", 40) == 0
    shown = capsys.readouterr().out
    assert manifest.fingerprint in shown
    assert all(text in shown for text in corpus)


def test_the_output_does_not_depend_on_the_number_of_workers(tmp_path: Path, corpus: list[str]) -> None:
    outputs = []
    for workers in (1, 2, 3):
        output = tmp_path / f"out-{workers}"
        report = prepare([tmp_path / "in"], "byte", output, workers=workers, unit_bytes=400)
        assert len(report.manifest.shards) > 3
        outputs.append(content(output))
    assert outputs[0] == outputs[1] == outputs[2]
    assert sorted(documents(tmp_path / "out-3")) == sorted(corpus)


def test_several_inputs_may_follow_one_option_or_have_one_each(tmp_path: Path, corpus: list[str]) -> None:
    a, c, d = (tmp_path / "in" / name for name in ("a.jsonl", "c.txt", "d.txt"))
    assert run("prepare", "--input", a, c, d, "--tokenizer", "byte", "--output", tmp_path / "one") == 0
    assert (
        run("prepare", "--input", d, "--input", a, "--input", c, "--tokenizer", "byte", "--output", tmp_path / "two")
        == 0
    )
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert sorted(documents(tmp_path / "one")) == sorted(corpus[:30] + corpus[38:])


def test_the_text_may_be_under_another_key(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"body": "hello", "text": 3}\n')
    assert run(*arguments(tmp_path, "--text-key", "body")) == 0
    assert documents(tmp_path / "out") == ["hello"]


def test_a_unit_without_documents_makes_no_shard(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, text in (("a", "one"), ("b", ""), ("c", "three")):
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    report = prepare([tmp_path / "in"], "byte", tmp_path / "out", unit_bytes=1)
    assert [shard.name for shard in report.manifest.shards] == ["shard-00000", "shard-00002"]
    assert sorted(documents(tmp_path / "out")) == ["one", "three"]
    assert "shard-00001.bin" not in os.listdir(tmp_path / "out")


FAULTY = (b"{oops", b'{"text": "\xff"}', b'{"body": 1}', b'{"text": 1}', b"[]")


def test_faulty_records_are_counted_by_reason_shown_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    write_lines(tmp_path / "in" / "a.jsonl", ["one", "", "two"], FAULTY)
    assert run(*arguments(tmp_path)) == 0
    assert sorted(documents(tmp_path / "out")) == ["one", "two"]
    assert Manifest.load(tmp_path / "out").skipped == {
        "'text' is not a string": 1,
        "empty": 1,
        "invalid UTF-8": 1,
        "malformed JSON": 1,
        "no 'text' field": 1,
        "not a JSON object": 1,
    }
    shown = capsys.readouterr().out
    assert f"skipped {tmp_path}/in/a.jsonl:4: malformed JSON" in shown
    assert f"skipped {tmp_path}/in/a.jsonl:6: no 'text' field (and 2 more)" in shown


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("limit", "passes"),
    [
        (None, True),
        ("0", False),
        ("4", False),
        ("5", True),
        ("4%", False),
        ("5%", True),
        ("0.04", False),
        ("0.05", True),
    ],
)
def test_faulty_records_beyond_the_limit_end_in_one_line_and_leave_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str | None, passes: bool, workers: int
) -> None:
    (tmp_path / "in").mkdir()
    write_lines(tmp_path / "in" / "a.jsonl", ["text"] * 95, FAULTY)
    (tmp_path / "in" / "b.txt").write_text("")  # an empty document is a record, but not a faulty one
    options = ["--workers", workers, *(["--max-skipped", limit] if limit else [])]
    if passes:
        assert run(*arguments(tmp_path, *options)) == 0
        return
    message = refused(capsys, *arguments(tmp_path, *options))
    assert "5 of 101 records are faulty" in message
    assert "malformed JSON: 1" in message
    assert "a.jsonl:96: malformed JSON" in message
    assert os.listdir(tmp_path) == ["in"]


def test_the_default_limit_is_one_percent_and_never_below_ten() -> None:
    for faulty, records, allowed in ((10, 10, True), (11, 12, False), (20, 2000, True), (21, 2000, False)):
        assert SkipLimit().allows(faulty, records) == allowed


@pytest.mark.parametrize("text", ["", "-1", "many", "101%", "1.5", "nan", "inf", "%"])
def test_a_limit_that_is_no_count_and_no_share_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--max-skipped"):
        SkipLimit.parse(text)


def folder(**files: bytes) -> Callable[[Path], None]:
    def make(tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        for name, content in files.items():
            (tmp_path / "in" / name.replace("_", ".")).write_bytes(content)

    return make


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (lambda tmp_path: None, [], "in: no such file or folder"),
        (folder(), [], "in: no .jsonl, .jsonl.gz, .txt file in this folder"),
        (folder(a_pdf=b"x"), [], "in: no .jsonl, .jsonl.gz, .txt file in this folder"),
        (folder(a_jsonl=b""), [], "--input: the corpus is empty"),
        (
            folder(a_jsonl=b'{"text": ""}\n', b_txt=b"\n"),
            [],
            "the corpus is empty: no document in it has a text (empty: 2)",
        ),
        (folder(a_jsonl=b'{"body": "x"}\n'), [], "(no 'text' field: 1)"),
        (folder(a_jsonl=b"{\n" * 11), [], "11 of 11 records are faulty"),
        (folder(a_jsonl_gz=b"no gzip"), [], "a.jsonl.gz: damaged gzip file"),
        (folder(a_txt=b"x"), ["--workers", "0"], "--workers 0: must be at least 1"),
        (folder(a_txt=b"x"), ["--workers", "two"], "--workers"),
        (folder(a_txt=b"x"), ["--max-skipped", "lots"], "--max-skipped lots: neither a count"),
        (folder(a_txt=b"x"), ["--tokenizer", "nowhere"], "tokenizer nowhere: no such file or directory"),
        (folder(a_txt=b"x"), ["--unknown"], "--unknown"),
    ],
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], None],
    options: list[str],
    reason: str,
) -> None:
    make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert reason in refused(capsys, *arguments(tmp_path, *options))
    assert sorted(tmp_path.rglob("*")) == before


def test_parents_that_were_made_go_with_the_output_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(a_jsonl=b"")(tmp_path)
    output = tmp_path / "new" / "deep" / "out"
    refused(capsys, "prepare", "--input", tmp_path / "in", "--tokenizer", "byte", "--output", output)
    assert os.listdir(tmp_path) == ["in"]


def test_prepared_data_is_replaced_only_when_asked(
    tmp_path: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments(tmp_path)) == 0
    first = content(tmp_path / "out")
    write_lines(tmp_path / "in" / "e.jsonl", ["one more"])
    assert "out: written already" in refused(capsys, *arguments(tmp_path))
    assert content(tmp_path / "out") == first
    assert run(*arguments(tmp_path, "--overwrite")) == 0
    assert sorted(documents(tmp_path / "out")) == sorted([*corpus, "one more"])
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_a_replacement_that_fails_leaves_what_was_there(
    tmp_path: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments(tmp_path)) == 0
    first = content(tmp_path / "out")
    refused(capsys, *arguments(tmp_path, "--overwrite", "--text-key", "nope"))
    assert content(tmp_path / "out") == first
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_files_of_others_are_never_replaced(
    tmp_path: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    assert "it holds other files (thesis.tex)" in refused(capsys, *arguments(tmp_path, "--overwrite"))
    assert os.listdir(tmp_path / "out") == ["thesis.tex"]
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("a file")
    assert "out: this is a file" in refused(capsys, *arguments(tmp_path, "--overwrite"))


def test_an_empty_directory_and_a_link_to_one_will_do_as_output(tmp_path: Path, corpus: list[str]) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    assert run(*arguments(tmp_path)) == 0
    assert sorted(documents(tmp_path / "out")) == sorted(corpus)
    assert (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path: Path, workers: int) -> None:
    """On a real file system of 256 kB where this user may mount one, else with a limit on the size of files."""
    folder(a_txt=b"x" * 1_000_000, b_txt=b"x" * 70_000_000)(tmp_path)
    (tmp_path / "disk").mkdir()
    output = tmp_path / "disk" / "out"
    script = f"""
import os, sys
from megalm.cli import main
if __name__ == "__main__":
    code = main("data prepare --tokenizer byte --workers {workers} --input {tmp_path}/in --output {output}".split())
    print(os.listdir({str(output.parent)!r}))
    sys.exit(code)
"""
    (tmp_path / "script.py").write_text(script)
    command = f"{sys.executable} {tmp_path}/script.py"
    mount = f"mount -t tmpfs -o size=256k none {output.parent}"
    may_mount = (
        shutil.which("unshare") and subprocess.run(["unshare", "-rm", "sh", "-c", mount], check=False).returncode == 0
    )
    full = (
        ["unshare", "-rm", "sh", "-c", f"{mount} && {command}"]
        if may_mount
        else ["sh", "-c", f"ulimit -f 500; {command}"]
    )
    done = subprocess.run(full, capture_output=True, text=True, timeout=100, check=False)
    reason = "No space left on device" if may_mount else "File too large"
    assert done.stderr == f"megalm: error: --output {output}: {reason}: nothing was written: free some space\n"
    assert (done.returncode, done.stdout) == (2, "[]\n")


def large_corpus(tmp_path: Path) -> None:
    """Text that takes seconds to encode, in several units."""
    (tmp_path / "in").mkdir()
    words = " ".join(f"word{i * 7919 % 10007}" for i in range(20_000))
    for i in range(8):
        write_lines(tmp_path / "in" / f"{i}.jsonl", [f"{i} {words}"] * 20)
    train_tokenizer("bpe", 300, [tmp_path / "in" / "0.jsonl"], tmp_path / "tokenizer")


def start(tmp_path: Path) -> subprocess.Popen[bytes]:
    """The command with two workers, in a process group of its own, once it is writing."""
    large_corpus(tmp_path)
    command = ["-c", "import sys; from megalm.cli import main; sys.exit(main())", "data", "prepare", "--workers", "2"]
    paths = ["--input", tmp_path / "in", "--tokenizer", tmp_path / "tokenizer", "--output", tmp_path / "out"]
    process = subprocess.Popen(
        [sys.executable, *command, *map(str, paths)], stderr=subprocess.PIPE, start_new_session=True
    )
    wait_until_writing(tmp_path)
    return process


def wait_until_writing(tmp_path: Path) -> None:
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.tmp-*/.shard-*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(group: int) -> list[str]:
    """The processes of a group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, process_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                found.append(stat.parent.name)
    return found


def test_a_worker_that_is_killed_ends_the_command_and_leaves_nothing(tmp_path: Path) -> None:
    large_corpus(tmp_path)
    failures: list[UserError] = []

    def command() -> None:
        try:
            prepare([tmp_path / "in"], str(tmp_path / "tokenizer"), tmp_path / "out", workers=2, unit_bytes=1 << 20)
        except UserError as error:
            failures.append(error)

    thread = threading.Thread(target=command)
    thread.start()
    wait_until_writing(tmp_path)
    victim = multiprocessing.active_children()[0]
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    thread.join(60)
    assert not thread.is_alive()
    (failure,) = failures
    assert "a worker process was killed by SIGKILL: nothing was written" in str(failure)
    assert multiprocessing.active_children() == []
    assert sorted(os.listdir(tmp_path)) == ["in", "tokenizer"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_told_to_stop_leaves_nothing_and_nobody(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = start(tmp_path)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert b"Traceback" not in errors
    assert process.returncode == code
    assert sorted(os.listdir(tmp_path)) == ["in", "tokenizer"]
    assert alive(process.pid) == []


def test_workers_end_when_the_command_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(process.pid) == []


def test_preparing_does_not_import_torch(tmp_path: Path, corpus: list[str]) -> None:
    script = f"""
import sys
from megalm.cli import main
main("data prepare --tokenizer byte --workers 1 --input {tmp_path}/in --output {tmp_path}/out".split())
main("data inspect {tmp_path}/out".split())
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.endswith("False\n")


# --- inspect


@pytest.fixture
def prepared(tmp_path: Path, corpus: list[str]) -> Path:
    prepare([tmp_path / "in"], "byte", tmp_path / "out", unit_bytes=1000)
    return tmp_path / "out"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: flip(d / "shard-00001.bin"), "shard-00001.bin: altered: its checksum is not the manifest's"),
        (lambda d: flip(d / "shard-00001.idx"), "shard-00001.idx: damaged: its documents do not cover"),
        (lambda d: (d / "shard-00001.bin").unlink(), "shard-00001.bin: the file is missing"),
        (lambda d: (d / "shard-00001.idx").unlink(), "shard-00001.idx: the file is missing"),
        (lambda d: os.truncate(d / "shard-00001.bin", 5), "shard-00001.bin: too short"),
        (lambda d: os.truncate(d / "shard-00001.idx", 5), "shard-00001.idx: corrupt index"),
        (lambda d: shutil.copy(d / "shard-00000.idx", d / "shard-00001.idx"), "shard-00001.idx"),
        (lambda d: (d / "manifest.json").unlink(), "no manifest.json inside"),
    ],
)
def test_inspect_names_the_damaged_file(
    prepared: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], reason: str
) -> None:
    damage(prepared)
    assert reason in refused(capsys, "inspect", prepared)


def test_inspect_names_every_damaged_file_up_to_three(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in prepared.glob("*.bin"):
        flip(path)
    count = len(list(prepared.glob("*.bin")))
    assert count > 3
    message = refused(capsys, "inspect", prepared)
    assert message.count("altered") == 3
    assert f"(and {count - 3} more): prepare the data again" in message


def test_samples_are_spread_evenly_and_read_as_they_lie(prepared: Path, corpus: list[str]) -> None:
    manifest = Manifest.load(prepared)
    in_order = documents(prepared)
    for count in (0, 1, 3, 39, 40, 100):
        found = [sample.text for sample in samples(prepared, manifest, load_tokenizer("byte"), count)]
        wanted = min(count, 40)
        assert found == [in_order[i * 40 // wanted] for i in range(wanted)]


def test_inspect_spells_out_what_would_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(a_txt=b"\x1b[31mred\x07")(tmp_path)
    assert run(*arguments(tmp_path)) == 0
    assert run("inspect", tmp_path / "out") == 0
    assert "\\x1b[31mred\\x07" in capsys.readouterr().out


def test_inspect_finds_a_tokenizer_that_was_moved_and_refuses_another(
    tmp_path: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, size in (("tokenizer", 290), ("other", 300)):
        train_tokenizer("bpe", size, [tmp_path / "in"], tmp_path / name)
    prepare([tmp_path / "in"], str(tmp_path / "tokenizer"), tmp_path / "out")
    (tmp_path / "tokenizer").rename(tmp_path / "moved")
    assert run("inspect", tmp_path / "out", "--samples", 0) == 0
    assert run("inspect", tmp_path / "out", "--tokenizer", tmp_path / "moved") == 0
    capsys.readouterr()
    for options in ([], ["--tokenizer", tmp_path / "other"]):
        assert run("inspect", tmp_path / "out", *options) == 2
        assert capsys.readouterr().err.count("\n") == 1
