"""The rules that documents are filtered by, as a user writes them: one section a rule, each left out unless given.

language: {keep: [en, de]}
gopher_quality: {min_words: 100}          the defaults are the paper's numbers; `null` switches one check off
gopher_repetition: {}
decontaminate: {files: [eval/mmlu.jsonl]}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from megalm.errors import UserError, nearest

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def _numbered(shares: Any) -> Any:
    """The keys of YAML are text."""
    if not isinstance(shares, dict):
        return shares
    return {int(n) if isinstance(n, str) and n.isdecimal() else n: share for n, share in shares.items()}


Shares = Annotated[dict[Annotated[int, Field(ge=1, le=100)], Share], BeforeValidator(_numbered)]


class Breach(NamedTuple):
    """Why a document is removed: what is wrong, as it is counted, and how in this document."""

    reason: str
    detail: str


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class Length(Section):
    """How long a document may be. Words are what white space separates."""

    min_characters: Count | None = None
    max_characters: Count | None = None
    min_words: Count | None = None
    max_words: Count | None = None


class GopherQuality(Section):
    """Rae et al. (2021), "Scaling language models", arXiv:2112.11446, section A.1.1, "Quality filtering"."""

    min_words: Count | None = 50
    max_words: Count | None = 100_000
    min_mean_word_length: float | None = 3
    max_mean_word_length: float | None = 10
    max_hashes_per_word: float | None = 0.1
    max_ellipses_per_word: float | None = 0.1
    max_bullet_lines: Share | None = 0.9
    max_ellipsis_lines: Share | None = 0.3
    min_alphabetic_words: Share | None = 0.8
    min_stop_words: Count | None = 2
    """How many different ones of `the be to of and that have with`: for English only."""


class GopherRepetition(Section):
    """Rae et al. (2021), table A1. An n-gram's share is of the text's characters."""

    max_duplicate_paragraphs: Share | None = 0.30
    max_duplicate_paragraph_characters: Share | None = 0.20
    max_duplicate_lines: Share | None = 0.30
    max_duplicate_line_characters: Share | None = 0.20
    max_top_ngram: Shares = {2: 0.20, 3: 0.18, 4: 0.16}
    max_duplicate_ngrams: Shares = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


class C4(Section):
    """Raffel et al. (2020), "Exploring the limits of transfer learning", arXiv:1910.10683, section 2.2: the rules for
    whole pages. Lines are not removed; sentences are counted in those lines that C4 would keep."""

    min_sentences: Count | None = 5
    min_line_words: Count = 3
    """A line of fewer words has no sentence that counts; nor has one without terminal punctuation, or of Javascript."""
    lorem_ipsum: bool = True
    curly_bracket: bool = True


class FineWeb(Section):
    """Penedo et al. (2024), "The FineWeb datasets", arXiv:2406.17557, section 3.6."""

    min_punctuated_lines: Share | None = 0.12
    max_duplicate_line_characters: Share | None = 0.1
    max_short_lines: Share | None = 0.67
    short_line: Count = 30


class Language(Section):
    """The language that py3langid takes the document's first 4,096 characters for."""

    keep: Annotated[list[str], Field(min_length=1)]
    """ISO 639 codes, as `en`."""
    min_confidence: Share = 0.5


class Decontaminate(Section):
    """A document that has a run of `ngram` words in common with one of the evaluation files is removed.

    Brown et al. (2020), "Language models are few-shot learners", arXiv:2005.14165, appendix C: runs of 13 words, or of
    all words where an example has fewer, down to 8.
    """

    files: Annotated[list[str], Field(min_length=1)]
    """Of the kinds that are training data too. Each text in a record counts as an example, whatever its key."""
    ngram: Annotated[int, Field(ge=1)] = 13
    min_words: Annotated[int, Field(ge=1)] = 8
    """Shorter examples are not looked for."""


class Rules(Section):
    """In the order in which they are tried: what is cheap comes first. The first that a document breaks is named."""

    length: Length | None = None
    gopher_quality: GopherQuality | None = None
    c4: C4 | None = None
    fineweb: FineWeb | None = None
    gopher_repetition: GopherRepetition | None = None
    decontaminate: Decontaminate | None = None
    language: Language | None = None


def load_rules(path: Path | None, given: dict[str, dict[str, Any]]) -> Rules:
    """The rules in a YAML file, if there is one, with the sections and keys `given` on the command line over them.

    A `UserError` names the key that is wrong, or says that there is no rule at all.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        from megalm.config.text import read_yaml

        raw = {name: {} if section is None else section for name, section in read_yaml(path).items()}
    for name, section in given.items():
        below = raw.get(name)
        raw[name] = {**(below if isinstance(below, dict) else {}), **section}
    try:
        rules = Rules.model_validate(raw)
    except ValidationError as error:
        raise UserError(_explain(error, str(path) if path else "rules")) from None
    if rules == Rules():
        raise UserError(
            f"no rule is given: name one, as in --language en, or in --rules FILE: {', '.join(_sections())}"
        )
    return rules


def _sections() -> list[str]:
    return list(Rules.model_fields)


def _explain(error: ValidationError, where: str) -> str:
    """pydantic's first finding in one line."""
    finding = error.errors()[0]
    names = [str(part) for part in finding["loc"]]
    key = ".".join(names)
    if finding["type"] == "extra_forbidden":
        section = Rules.model_fields[names[0]].annotation if len(names) > 1 else Rules
        known = list(_fields(section))
        return f"{where}: {key}: unknown key.{nearest(names[-1], known) or ' They are ' + ', '.join(known) + '.'}"
    if finding["type"] == "missing":
        return f"{where}: {key} is missing: set it"
    what = (
        "must be a mapping of keys"
        if finding["type"] == "model_type"
        else finding["msg"].replace("Input should", "must")
    )
    return f"{where}: {key}={finding['input']!r} {what}"


def _fields(annotation: Any) -> list[str]:
    models = [annotation, *getattr(annotation, "__args__", ())]
    return next(list(m.model_fields) for m in models if isinstance(m, type) and issubclass(m, BaseModel))
