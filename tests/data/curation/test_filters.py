"""`megalm data filter` and its rules, through the command line."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from curated import contents, kept_lines

from megalm.cli import main
from megalm.data.curation.filters import filter_documents
from megalm.data.curation.language import LanguageCheck
from megalm.data.curation.rules import Language, Rules, load_rules
from megalm.data.workers import map_in_order
from megalm.errors import UserError

TEXTS = {
    "en": "The committee decided that the new library should open its doors before the end of the year. "
    "It will have more rooms than the old one, and a garden where people can read when the sun is out.",
    "de": "Der Ausschuss hat beschlossen, dass die neue Bibliothek noch vor Jahresende eröffnet werden soll. "
    "Sie wird mehr Räume haben als die alte, und einen Garten, in dem man bei Sonne lesen kann.",
    "fr": "Le comité a décidé que la nouvelle bibliothèque ouvrirait ses portes avant la fin de l'année. "
    "Elle aura plus de salles que l'ancienne, et un jardin où l'on pourra lire au soleil.",
    "ja": "委員会は新しい図書館を年末までに開館することを決定しました。古い図書館よりも部屋が多く、庭もあります。",
    "ru": "Комитет решил, что новая библиотека должна открыться до конца года. В ней будет больше залов и сад.",
}


@pytest.mark.parametrize("language", TEXTS)
def test_a_language_is_told_from_the_others(language: str) -> None:
    check = LanguageCheck(Language(keep=[language])).check
    assert check(TEXTS[language]) is None
    for other, text in TEXTS.items():
        found = check(text)
        assert other == language or (found is not None and found.reason == other)
    both = LanguageCheck(Language(keep=[language, "en"])).check
    assert both(TEXTS["en"]) is None


def test_a_language_that_is_unsure_is_removed() -> None:
    text = "It was a good day for them."
    found = LanguageCheck(Language(keep=["en"], min_confidence=1.0)).check(text)
    assert found is not None
    assert found.reason == "en, unsure"
    assert LanguageCheck(Language(keep=["en"], min_confidence=0.0)).check(text) is None


@pytest.fixture
def corpus(write_lines, tmp_path: Path) -> Path:
    records = [{"id": i, "text": text, "lang": name, "x": [1.5]} for i, (name, text) in enumerate(TEXTS.items())]
    return write_lines("in.jsonl", [*records, "# # #", TEXTS["en"] + " lorem ipsum", "This is short.", " "])


def test_each_removal_is_counted_by_rule_with_its_first_examples(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    options = ["--language", "en,de", "--c4", "--min-characters", "6"]
    (tmp_path / "rules.yaml").write_text("c4: {min_sentences: 2, min_line_words: 1}\nlength: {max_words: 100}\n")
    command = ["data", "filter", "--input", str(corpus), "--output", str(output), *options]
    assert main([*command, "--rules", str(tmp_path / "rules.yaml")]) == 0
    lines = corpus.read_bytes().splitlines()
    assert kept_lines(output) == lines[:2]
    report = json.loads((output / "report.json").read_text())
    assert (report["records"], report["documents"], report["kept"], report["removed"]) == (9, 8, 2, 6)
    assert report["skipped"] == {"empty": 1}
    rules = report["removed_by_rule"]
    assert list(rules) == ["length", "c4", "language"], "in the order in which they are tried"
    assert {name: rule["documents"] for name, rule in rules.items()} == {"length": 1, "c4": 2, "language": 3}
    assert rules["length"]["reasons"] == {"too low: characters": 1}
    assert rules["c4"]["reasons"] == {"lorem ipsum": 1, "too low: sentences": 1}
    assert rules["language"]["reasons"] == {"fr": 1, "ja": 1, "ru": 1}
    example = rules["language"]["examples"][0]
    assert example["document"] == f"{corpus}:3"
    assert example["text"] == TEXTS["fr"][:200]
    assert report["rules"]["length"] == {"min_characters": 6, "max_words": 100}
    shown = capsys.readouterr().out
    for name, rule in rules.items():
        assert f"removed by {name}" in shown
        assert f"{name} removed {rule['examples'][0]['document']}" in shown


def test_every_rule_can_be_given_by_a_flag(tmp_path: Path, write_lines) -> None:
    path = write_lines("in.jsonl", ["x"])
    evaluation = write_lines("eval.jsonl", [TEXTS["en"]])
    flags = {
        "length": ["--max-characters", "9", "--min-characters", "2", "--min-words", "0", "--max-words", "7"],
        "gopher_quality": ["--gopher-quality"],
        "c4": ["--c4"],
        "fineweb": ["--fineweb"],
        "gopher_repetition": ["--gopher-repetition"],
        "decontaminate": ["--decontaminate", str(evaluation)],
        "language": ["--language", "de", "--min-confidence", "0.25"],
    }
    assert list(flags) == list(Rules.model_fields)
    for name, options in flags.items():
        output = tmp_path / name
        assert main(["data", "filter", "--input", str(path), "--output", str(output), *options]) == 0
        report = json.loads((output / "report.json").read_text())
        assert list(report["removed_by_rule"]) == list(report["rules"]) == [name]
    assert report["rules"]["language"] == {"keep": ["de"], "min_confidence": 0.25}


def test_contaminated_documents_are_removed(tmp_path: Path, write_lines) -> None:
    path = write_lines("in.jsonl", [TEXTS["de"], "Look: " + TEXTS["en"].upper().replace(" ", "\n"), TEXTS["fr"]])
    evaluation = write_lines("eval.jsonl", [{"question": TEXTS["en"][:100]}])
    rules = load_rules(None, {"decontaminate": {"files": [str(evaluation)]}})
    report = filter_documents([path], tmp_path / "out", rules)
    assert report.rules["decontaminate"].reasons == {str(evaluation): 1}
    assert report.rules["decontaminate"].examples[0].document == f"{path}:2"
    assert kept_lines(tmp_path / "out") == [path.read_bytes().splitlines()[i] for i in (0, 2)]


def test_the_output_does_not_depend_on_workers(tmp_path: Path, write_lines) -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(TEXTS["en"].split(), k=rng.randrange(1, 90))) for _ in range(200)]
    path = write_lines("in.jsonl", [*texts, {"no": "text"}])
    rules = load_rules(None, {"gopher_repetition": {}, "language": {"keep": ["en"]}, "length": {"min_words": 10}})
    for workers in (1, 3):
        filter_documents([path], tmp_path / f"out{workers}", rules, workers=workers, unit_bytes=10_000)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")
    report = json.loads((tmp_path / "out1" / "report.json").read_text())
    assert 0 < report["kept"] < 200
    assert report["faulty_examples"] == [f"{path}:201: no 'text' field"]


def test_mistakes_are_one_line_and_leave_nothing(
    tmp_path: Path, write_lines, refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines("in.jsonl", ["x"])
    yaml = tmp_path / "rules.yaml"
    output = tmp_path / "out"
    base = ["filter", "--input", path, "--output", output]

    def refused_rules(text: str) -> str:
        yaml.write_text(text)
        return refused(*base, "--rules", yaml)

    assert "no rule is given" in refused(*base)
    assert "language.keep is missing" in refused(*base, "--min-confidence", "0.3")
    assert "--language xx: not a language that is known" in refused(*base, "--language", "en,xx")
    assert "no such file or folder" in refused(*base, "--decontaminate", tmp_path / "nowhere.jsonl")
    assert "length.min_words=-1 must be greater" in refused(*base, "--min-words", "-1")
    assert "--workers 0" in refused(*base, "--c4", "--workers", "0")
    assert "rules.yaml: gopher_qualty: unknown key. Did you mean 'gopher_quality'?" in refused_rules(
        "gopher_qualty: {}"
    )
    assert "c4.min_sentence: unknown key. Did you mean 'min_sentences'?" in refused_rules("c4: {min_sentence: 3}")
    assert "c4=3 must be a mapping of keys" in refused_rules("c4: 3")
    assert "fineweb.max_short_lines=2 must be less than" in refused_rules("fineweb: {max_short_lines: 2}")
    assert "gopher_repetition.max_top_ngram" in refused_rules("gopher_repetition: {max_top_ngram: {x: 0.1}}")
    assert "holds no mapping" in refused_rules("[c4]")
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    assert "pip install 'megalm[curation]'" in refused(*base, "--language", "en")
    monkeypatch.setitem(sys.modules, "rensa", None)
    assert "pip install 'megalm[curation]'" in refused(*base, "--decontaminate", path)
    yaml.unlink()
    assert list(tmp_path.iterdir()) == [path]
    assert main(["data", *map(str, base), "--gopher-quality"]) == 0, "published rules need no other package"
    assert list(json.loads((output / "report.json").read_text())["removed_by_rule"]) == ["gopher_quality"]
    assert "written already" in refused(*base, "--c4")
    assert main(["data", *map(str, base), "--c4", "--overwrite"]) == 0


def test_a_section_left_empty_or_keyed_by_numbers_is_read(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text('fineweb:\ngopher_repetition: {max_top_ngram: {"2": 0.5}}\n')
    rules = load_rules(tmp_path / "rules.yaml", {})
    assert rules.fineweb is not None
    assert rules.gopher_repetition is not None
    assert rules.gopher_repetition.max_top_ngram == {2: 0.5}


def test_the_example_is_read() -> None:
    rules = load_rules(Path(__file__).parents[3] / "examples" / "curation" / "filter-rules.yaml", {})
    assert rules.model_fields_set == set(Rules.model_fields) - {"decontaminate"}
    assert rules.gopher_quality is not None
    assert (rules.gopher_quality.min_words, rules.gopher_quality.max_words) == (100, 100_000)


def identity() -> object:
    return abs


def killer() -> object:
    return lambda task: os.kill(os.getpid(), signal.SIGKILL) if task == 5 else task


def unhappy(kind: type[Exception]) -> object:
    def do(task: int) -> int:
        if task == 5:
            raise kind("at five")
        return task

    return do


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    assert list(map_in_order(identity, [-i for i in range(30)], workers)) == list(range(30))  # type: ignore[arg-type]
    assert list(map_in_order(identity, [], workers)) == []  # type: ignore[arg-type]


def test_a_worker_that_dies_or_fails_ends_the_command() -> None:
    with pytest.raises(UserError, match="a worker process was killed by SIGKILL"):
        list(map_in_order(killer, range(10), 2))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^at five$"):
        list(map_in_order(partial(unhappy, UserError), range(10), 2))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"in a worker process(.|\n)*at five"):
        list(map_in_order(partial(unhappy, ValueError), range(10), 2))  # type: ignore[arg-type]
