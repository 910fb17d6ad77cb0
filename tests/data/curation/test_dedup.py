"""`megalm data dedup`: what repeats goes, all else stays as it was."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from curated import contents, kept_lines
from hypothesis import given
from hypothesis import strategies as st

from megalm.cli import main
from megalm.data.curation.dedup import dedup, first_equal

Json = dict[str, object]


def document(rng: random.Random, words: int = 200) -> str:
    return " ".join(f"w{rng.randrange(10_000)}" for _ in range(words))


@pytest.fixture
def mixed(tmp_path: Path) -> list[str]:
    """A folder `in` of every kind of file, with copies across files, and its texts in the order of reading."""
    rng = random.Random(3)
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [document(rng) for _ in range(60)]
    texts += [texts[rng.randrange(60)] for _ in range(40)]
    rng.shuffle(texts)
    lines = [json.dumps({"id": f"doc-{i}", "text": text, "meta": {"n": [i, 1.0]}}) for i, text in enumerate(texts)]
    (folder / "a.jsonl").write_text("\n".join(lines[:50]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\r\n".join(lines[50:95]).encode()))
    for i in range(95, 100):
        (folder / f"c{i}.txt").write_text(texts[i])
    return texts


@pytest.mark.parametrize("kind", ["exact", "minhash"])
def test_equal_texts_are_removed_as_a_set_of_those_seen_would(
    tmp_path: Path, mixed: list[str], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["data", "dedup", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--kind", kind]) == 0
    )
    seen: set[str] = set()
    firsts = [text for text in mixed if not (text in seen or seen.add(text))]  # type: ignore[func-returns-value]
    assert [json.loads(line)["text"] for line in kept_lines(tmp_path / "out")] == firsts
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    removed = len(mixed) - len(firsts)
    assert (report["documents"], report["kept"], report["removed_exact"]) == (100, len(firsts), removed)
    assert report["text_bytes"] == sum(len(text) for text in mixed)
    assert report["kept_bytes"] == sum(len(text) for text in firsts)
    shown = capsys.readouterr().out
    assert f"{removed}" in shown
    assert "repeats" in shown


def test_what_is_kept_is_kept_byte_for_byte(tmp_path: Path) -> None:
    lines = [
        b'{"text": "one", "big": 123456789012345678901234567890, "f": 1.50, "u": "\\u00e9"}',
        b'  {"id":7,"text":"two","nested":{"b":[],"a":null}}',
        b'{"text": "three"}\t',
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join([*lines, b"", lines[0]]))
    dedup([tmp_path / "in.jsonl"], tmp_path / "out")
    assert (tmp_path / "out" / "part-00000.jsonl").read_bytes() == b"".join(line + b"\n" for line in lines)


def test_each_duplicate_is_listed_with_what_it_repeats(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [document(rng) for _ in range(6)]
    near = texts[2] + " and a little more"
    records: list[Json] = [{"text": text, "id": f"id{i}"} for i, text in enumerate([*texts, texts[4], near, near])]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    (tmp_path / "z.txt").write_text(texts[0])
    report = dedup([path, tmp_path / "z.txt"], tmp_path / "out", unit_bytes=2000)
    assert (report.exact, report.near) == (2, 2)
    listed = [(d.document, d.id, d.repeats, d.repeats_id) for d in report.duplicates]
    assert listed == [
        (f"{path}:7", "id6", f"{path}:5", "id4"),
        (f"{path}:8", "id7", f"{path}:3", "id2"),
        (f"{path}:9", "id8", f"{path}:3", "id2"),
        (str(tmp_path / "z.txt"), None, f"{path}:1", "id0"),
    ]
    assert [d.similarity == 1 for d in report.duplicates] == [True, False, False, True]
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [tuple(d.values())[:4] for d in saved["duplicates"]] == listed
    capped = dedup([path, tmp_path / "z.txt"], tmp_path / "capped", listed=2)
    assert [d.document for d in capped.duplicates] == [f"{path}:7", f"{path}:8"]
    assert (capped.exact, capped.near) == (2, 2)


@pytest.mark.parametrize(("changed", "removed"), [(1, True), (2, True), (8, False), (20, False)])
def test_near_duplicates_of_known_similarity(tmp_path: Path, changed: int, removed: bool) -> None:
    """A changed word of 204, far from the others, changes 5 of 200 5-grams: J = (200 - 5 c) / (200 + 5 c)."""
    tokens = [f"w{i}" for i in range(204)]
    other = [f"x{i}" if i % 9 == 5 and i < 9 * changed else token for i, token in enumerate(tokens)]
    assert sum(a != b for a, b in zip(tokens, other, strict=True)) == changed
    similarity = (200 - 5 * changed) / (200 + 5 * changed)
    texts = [" ".join(tokens), document(random.Random(1)), " ".join(other)]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    report = dedup([tmp_path / "in.jsonl"], tmp_path / "out", threshold=0.8)
    assert report.near == removed
    if removed:
        assert report.duplicates[0].similarity == pytest.approx(similarity, abs=0.12)
    assert dedup([tmp_path / "in.jsonl"], tmp_path / "exact", kind="exact").counts.kept == 3
    assert dedup([tmp_path / "in.jsonl"], tmp_path / "low", threshold=0.1).near == 1


def test_nothing_else_than_near_duplicates_is_removed(tmp_path: Path) -> None:
    rng = random.Random(2)
    header = document(rng, 40)  # what unrelated pages of one site have in common
    texts = [f"{header} {document(rng, 160)}" for _ in range(100)] + ["?!", "...", "short", "text"]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert dedup([tmp_path / "in.jsonl"], tmp_path / "out").counts.kept == len(texts)


def test_the_output_does_not_depend_on_workers(tmp_path: Path, mixed: list[str]) -> None:
    folder = tmp_path / "in"
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n\n{"text": 3}\n{"text": " "}\n')
    for workers in (1, 3):
        output = tmp_path / f"out{workers}"
        report = dedup([folder], output, workers=workers, unit_bytes=20_000)
        assert report.faults == [f"{folder / 'broken.jsonl'}:2: 'text' is not a string"]
        assert report.counts.skipped == {"'text' is not a string": 1, "empty": 1}
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")
    assert len(contents(tmp_path / "out1")) > 2


def test_places_in_a_file_of_many_units_are_its_lines(tmp_path: Path) -> None:
    rng = random.Random(9)
    texts = [document(rng, 20) for _ in range(100)]
    texts[90] = texts[70]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    report = dedup([tmp_path / "in.jsonl"], tmp_path / "out", unit_bytes=1000)
    assert [(d.document, d.repeats) for d in report.duplicates] == [
        (f"{tmp_path / 'in.jsonl'}:91", f"{tmp_path / 'in.jsonl'}:71")
    ]


def test_another_text_key_and_a_folder_of_parts_can_be_read_again(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"body": "x", "text": "1"}\n{"body": "x", "text": "2"}\n')
    dedup([tmp_path / "in.jsonl"], tmp_path / "once", text_key="body")
    assert kept_lines(tmp_path / "once") == [b'{"body": "x", "text": "1"}']
    dedup([tmp_path / "once"], tmp_path / "twice", text_key="body")
    assert kept_lines(tmp_path / "twice") == kept_lines(tmp_path / "once")


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=30))
def test_the_first_equal_row_is_found(rows: list[tuple[int, int]]) -> None:
    found = first_equal(np.array(rows, np.uint64).reshape(-1, 2))
    assert found.tolist() == [rows.index(row) for row in rows]


def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path, refused, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n')
    output = tmp_path / "out"
    base = ["dedup", "--input", path, "--output", output]
    assert "no such file" in refused("dedup", "--input", tmp_path / "no.jsonl", "--output", output)
    assert "no such kind: choose exact or minhash" in refused(*base, "--kind", "fuzzy")
    for threshold in ("0", "1.1", "nan"):
        assert "--threshold" in refused(*base, "--threshold", threshold)
    assert "--ngram 0" in refused(*base, "--ngram", "0")
    assert "--list -1" in refused(*base, "--list", "-1")
    assert "--workers 0" in refused(*base, "--workers", "0")
    faulty = tmp_path / "faulty.jsonl"
    faulty.write_text('{"text": "a"}\n' + "{\n" * 11)
    message = refused("dedup", "--input", faulty, "--output", output)
    assert f"11 of 12 records are faulty (malformed JSON: 11; first {faulty}:2: malformed JSON)" in message
    faulty.write_text('{"text": " "}\n')
    assert "no document in it has a text (empty: 1)" in refused("dedup", "--input", faulty, "--output", output)
    monkeypatch.setitem(sys.modules, "rensa", None)
    assert "pip install 'megalm[curation]'" in refused(*base)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["faulty.jsonl", "in.jsonl"]
    assert main(["data", *map(str, base), "--kind", "exact"]) == 0, "equal texts are found without rensa"
    assert "written already" in refused(*base, "--kind", "exact")
    (output / "mine").write_text("")
    assert "it holds other files (mine)" in refused(*base, "--kind", "exact", "--overwrite")


def test_torch_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "This is a text in English, of a few words."}\n' * 2)
    script = f"""
import sys
from megalm.cli import main
main("data dedup --workers 1 --input {tmp_path}/in.jsonl --output {tmp_path}/once".split())
main("data filter --language en --c4 --workers 1 --input {tmp_path}/once --output {tmp_path}/twice".split())
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.endswith("False\n")
    assert (tmp_path / "twice" / "report.json").exists()
