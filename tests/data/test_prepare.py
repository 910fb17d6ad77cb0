"""`megalm data prepare`, through the command line."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megalm.cli import main
from megalm.data.counts import SkipLimit
from megalm.data.indexed import open_shard
from megalm.data.manifest import Manifest
from megalm.data.prepare import Settings, prepare
from megalm.data.shards import _ended
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
    assert run("inspect", tmp_path / "out", "--documents", 40) == 0
    shown = capsys.readouterr().out
    assert manifest.fingerprint in shown
    assert all(text in shown for text in corpus)


def test_the_output_does_not_depend_on_the_number_of_workers(tmp_path: Path, corpus: list[str]) -> None:
    outputs = []
    for workers in (1, 2, 3):
        output = tmp_path / f"out-{workers}"
        report = prepare([tmp_path / "in"], "byte", output, workers=workers, settings=Settings(unit_bytes=400))
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


def test_the_slurm_example_splits_the_work_over_its_array(tmp_path: Path, corpus: list[str]) -> None:
    script = Path(__file__).parents[2] / "examples" / "slurm" / "prepare.sh"
    (tmp_path / "bin").mkdir()
    command = f'#!/bin/sh\nexec {sys.executable} -c "import sys; from megalm.cli import main; sys.exit(main())" "$@"\n'
    (tmp_path / "bin" / "megalm").write_text(command)
    (tmp_path / "bin" / "megalm").chmod(0o755)
    for i in range(3):  # so that there is a unit for each of two tasks
        (tmp_path / "in" / f"large-{i}.txt").write_text("x" * 30_000_000)
    prepare([tmp_path / "in"], "byte", tmp_path / "whole")
    for task in (4, 3):
        slurm = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MIN": 3, "SLURM_ARRAY_TASK_COUNT": 2}
        slurm |= {"SLURM_PROCID": 0, "SLURM_NTASKS": 1}
        environment = {**os.environ, **{name: str(value) for name, value in slurm.items()}}
        environment["PATH"] = f"{tmp_path}/bin:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", script, tmp_path / "in", "byte", tmp_path / "out"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, f"rank {task - 3} of 2, as SLURM_ARRAY_TASK_ID says\n")
        assert (tmp_path / "out").exists() == (task == 3)
        assert ("this rank is done: " in done.stdout) == (task == 4)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_every_kind_of_file_gives_the_same_shards(tmp_path: Path, corpus: list[str]) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in corpus).encode()
    table = pyarrow.table({"text": corpus})
    outputs = []
    for name, content_of in (
        ("a.jsonl", lines),
        ("a.jsonl.gz", gzip.compress(lines)),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(lines)),
        ("a.parquet", b""),
    ):
        path = tmp_path / name
        path.write_bytes(content_of)
        if not content_of:
            pyarrow.parquet.write_table(table, path, row_group_size=7)
        output = tmp_path / f"out-{name}"
        prepare([path], "byte", output)
        outputs.append({file: data for file, data in content(output).items() if file != "preparation.json"})
        train_tokenizer("bpe", 290, [path], tmp_path / f"tokenizer-{name}")
        outputs[-1] |= content(tmp_path / f"tokenizer-{name}")
    assert all(output == outputs[0] for output in outputs)
    assert len(outputs[0]) == 5


def test_the_report_counts_by_input_and_is_kept(
    tmp_path: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "more.jsonl", ["one", "", "two"], (b"{",))
    paths = [tmp_path / "in", tmp_path / "more.jsonl"]
    assert run("prepare", "--input", *paths, "--tokenizer", "byte", "--output", tmp_path / "out") == 0
    kept = json.loads((tmp_path / "out" / "preparation.json").read_text())["sources"]
    text_bytes = sum(len(text.encode()) for text in corpus)
    assert kept == {
        str(tmp_path / "in"): {
            "records": 40,
            "documents": 40,
            "text_bytes": text_bytes,
            "tokens": text_bytes + 40,
            "skipped": {},
        },
        str(tmp_path / "more.jsonl"): {
            "records": 4,
            "documents": 2,
            "text_bytes": 6,
            "tokens": 8,
            "skipped": {"empty": 1, "malformed JSON": 1},
        },
    }
    shown = " ".join(capsys.readouterr().out.split())
    assert "source documents text tokens bytes per token skipped" in shown
    assert "more.jsonl 2 6 B 8 1.000 2" in shown


def test_documents_without_an_end_are_told_apart_by_the_index_alone(tmp_path: Path, corpus: list[str]) -> None:
    report = prepare([tmp_path / "in"], "byte", tmp_path / "out", Settings(append_eod=False, shuffle=False))
    assert report.manifest is not None
    (shard,) = report.manifest.shards
    reader = open_shard(tmp_path / "out", report.manifest, shard)
    found = [bytes(reader.document(i).astype(np.uint8)).decode() for i in range(reader.documents)]
    in_order = [*corpus[:30], corpus[38], corpus[39], *corpus[30:38]]
    assert found == in_order


def test_the_text_may_be_under_another_key(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"body": "hello", "text": 3}\n')
    assert run(*arguments(tmp_path, "--text-key", "body")) == 0
    assert documents(tmp_path / "out") == ["hello"]


def test_a_unit_without_documents_makes_no_shard(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, text in (("a", "one"), ("b", ""), ("c", "three")):
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    report = prepare([tmp_path / "in"], "byte", tmp_path / "out", settings=Settings(unit_bytes=1))
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
def test_faulty_records_beyond_the_limit_end_in_one_line_and_make_no_output(
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
    assert f"(1 of 1 units are kept in {tmp_path}/.out.work: the same command, run again, goes on there)" in message
    assert sorted(os.listdir(tmp_path)) == [".out.work", "in"]
    assert run(*arguments(tmp_path, "--max-skipped", 5)) == 0
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


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
        (folder(), [], "in: no .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt file in this folder"),
        (folder(a_pdf=b"x"), [], "in: no .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt file in this folder"),
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
    assert sorted(os.listdir(tmp_path)) == [".out.work", "in", "out"]


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
    assert done.stderr == f"megalm: error: --output {output}: {reason}: free some space\n"
    assert (done.returncode, done.stdout) == (2, "[]\n")


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


def test_documents_that_become_no_tokens_are_empty() -> None:
    tokens, lengths = np.array([5, 6, 7], np.uint16), np.array([0, 2, 0, 1, 0])
    ended, with_ends = _ended(tokens, lengths, 9)
    assert ended.tolist() == [5, 6, 9, 7, 9]
    assert with_ends.tolist() == [0, 3, 0, 2, 0]
    assert [part.tolist() for part in _ended(tokens[:0], np.zeros(2, np.int64), 9)] == [[], [0, 0]]
