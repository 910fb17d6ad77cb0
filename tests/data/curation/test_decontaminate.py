"""Runs of words of evaluation files are found in documents, whatever their case, punctuation and line ends."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megalm.data.curation.decontaminate import Contamination
from megalm.data.curation.rules import Decontaminate
from megalm.errors import UserError

QUESTION = "Which of the following rivers flows through the largest number of countries before it reaches the sea"
ANSWER = "The Danube flows through ten countries, more than any other river, before it ends in the Black Sea"


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    path = tmp_path / "eval.jsonl"
    records = [{"q": "too short to look for"}, {"q": QUESTION, "choices": ["a", {"label": ANSWER}], "n": 3}]
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


@pytest.fixture
def contamination(evaluation: Path) -> Contamination:
    return Contamination(Decontaminate(files=[str(evaluation)]))


def words(text: str, start: int, count: int) -> str:
    return " ".join(text.split()[start : start + count])


def test_a_shared_run_of_13_words_is_found_and_one_of_12_is_not(contamination: Contamination, evaluation: Path) -> None:
    for start in range(3):
        found = contamination.check(f"Something before it, {words(QUESTION, start, 13)} and after it.")
        assert found is not None
        assert found.reason == str(evaluation)
        assert f"13 words of {evaluation}:2: " in found.detail
        assert words(QUESTION, start, 13).lower() in found.detail
        assert contamination.check(f"Something before it, {words(QUESTION, start, 12)} and after it.") is None


@pytest.mark.parametrize(
    "form",
    [
        lambda text: text.upper(),
        lambda text: text.replace(" ", "\n"),
        lambda text: text.replace(" ", " \r\n\t> "),
        lambda text: text.replace(" ", ", "),
        lambda text: text.replace(" ", " -- "),
        lambda text: f"**{text}**?!",
    ],
)
def test_case_line_ends_and_punctuation_make_no_difference(contamination: Contamination, form) -> None:
    assert contamination.check("x " + form(QUESTION) + " y") is not None
    assert contamination.check("x " + form(ANSWER.replace(",", "")) + " y") is not None
    assert contamination.check("x " + form(words(QUESTION, 0, 9)) + " y") is None


def test_words_in_another_order_are_none(contamination: Contamination) -> None:
    assert contamination.check(" ".join(reversed(QUESTION.split()))) is None
    assert contamination.check("") is None


def test_an_example_of_fewer_words_is_looked_for_whole_down_to_the_least(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text(json.dumps({"q": "one two three four five six seven eight", "short": "one two three"}))
    contamination = Contamination(Decontaminate(files=[str(path)]))
    assert (contamination.examples, contamination.short) == (1, 1)
    assert contamination.check("zero one two three four five six seven eight nine") is not None
    assert contamination.check("one two three four five six seven, ate") is None
    strict = Contamination(Decontaminate(files=[str(path)], ngram=3))
    assert (strict.examples, strict.short) == (2, 0)
    assert strict.check("so two three four it is") is not None
    with pytest.raises(UserError, match="no text of at least 9 words in it"):
        Contamination(Decontaminate(files=[str(path)], min_words=9))


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(f"{QUESTION}\n{ANSWER}")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(["a list", QUESTION[::-1]]).encode()))
    contamination = Contamination(Decontaminate(files=[str(tmp_path)]))
    found = contamination.check(f"{words(QUESTION, 8, 99)} {words(ANSWER, 0, 8)}")
    assert found is not None, "a run goes across the lines of a .txt"
    assert f"of {tmp_path / 'a.txt'}: " in found.detail
    found = contamination.check(QUESTION[::-1])
    assert found is not None
    assert f"of {tmp_path / 'b.jsonl.gz'}:1: " in found.detail


def test_the_columns_of_a_parquet_file_are_looked_into_whatever_their_names(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"question": ["short", QUESTION], "choices": [["a"], ["b", ANSWER]], "n": [1, 2]})
    parquet.write_table(table, tmp_path / "eval.parquet", row_group_size=1)
    contamination = Contamination(Decontaminate(files=[str(tmp_path / "eval.parquet")]))
    assert contamination.examples == 2
    for text in (QUESTION, ANSWER):
        found = contamination.check(text)
        assert found is not None
        assert f"of {tmp_path / 'eval.parquet'}:2: " in found.detail


def test_a_faulty_evaluation_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text(json.dumps({"q": QUESTION}) + "\n{\n")
    with pytest.raises(UserError, match=r"eval\.jsonl:2: malformed JSON"):
        Contamination(Decontaminate(files=[str(tmp_path / "eval.jsonl")]))
    (tmp_path / "eval.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"eval\.txt: invalid UTF-8"):
        Contamination(Decontaminate(files=[str(tmp_path / "eval.txt")]))
