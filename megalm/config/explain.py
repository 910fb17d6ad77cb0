"""pydantic's findings as one line for the user: key path, value, rule, mend."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from megalm.config.sections import Config
from megalm.config.text import plain_scalar
from megalm.errors import UserError, nearest

_WHAT = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "model_type": "must be a mapping of keys",
    "dict_type": "must be a mapping of keys",
    "too_long": "has too many elements",
    "too_short": "has too few elements",
}

_FORMS = {
    "parallel.pipeline.split": "must be numbers above 0 with commas, such as 5,6,6,5",
    "data.split": "must be up to three numbers with commas, such as 969,30,1",
    "run.time_limit": "must be seconds, or hours, minutes and seconds, such as 3:50:00",
}


def one_line(messages: list[str]) -> UserError:
    """The first message, and how many more there are."""
    more = f" (and {len(messages) - 1} more)" if len(messages) > 1 else ""
    return UserError(messages[0] + more)


def explain(error: ValidationError) -> UserError:
    """The error that tells the user what pydantic found. Unknown keys come first: they explain missing ones."""
    found: dict[str, list[Any]] = {}
    for finding in error.errors():
        found.setdefault(".".join(map(str, _path(finding["loc"]))), []).append(finding)
    groups = sorted(found.items(), key=lambda item: item[1][0]["type"] != "extra_forbidden")
    return one_line([_message(path, findings) for path, findings in groups])


def show(value: Any) -> str:
    """A value as the user would write it, cut to a readable length."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def choices(words: list[str]) -> str:
    """`a, b or c`."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _message(path: str, findings: list[Any]) -> str:
    first = findings[0]
    kind, value, loc = first["type"], first["input"], first["loc"]
    if kind == "extra_forbidden":
        return _unknown(path, loc)
    if kind == "missing":
        doc = _description(loc)
        either = "set it, or name a model.preset" if len(loc) == 2 and loc[0] == "model" else "set it"
        return f"{path} is missing: {either}{doc}"
    rules = [_WHAT.get(f["type"], f["msg"].replace("Input should be", "must be")) for f in findings]
    rule = " or ".join([rules[0], *(other.removeprefix("must be ") for other in rules[1:])])
    if kind == "string_pattern_mismatch":
        characters = "letters, digits, '.', '_' and '-'" if path.endswith(".name") else "characters that can be printed"
        rule = f"must be text of {characters}, and not empty"
    if path in _FORMS and any(f["type"] == "string_pattern_mismatch" for f in findings):
        return f"{path}={show(value)} {_FORMS[path]}"
    return f"{path}={show(value)} {rule}{_mend(kind, value, first)}"


def _mend(kind: str, value: Any, finding: Any) -> str:
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f": write {int(value):_}"
    if kind in ("int_type", "float_type") and isinstance(value, str):
        is_number = len(value) <= 40 and isinstance(plain_scalar(value), int | float)
        return ": remove the quotes" if is_number else ""
    if kind == "bool_type" and isinstance(value, str):
        return f": write {'true' if value.lower() in ('true', 'yes', 'on') else 'false'} without quotes"
    if kind == "string_type" and isinstance(value, int | float):
        return f': quote it: "{show(value)}"'
    if kind == "literal_error" and isinstance(value, str):
        hint = nearest(value, finding["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", "))
        return f".{hint}" if hint else ""
    if kind == "too_short":
        return f": it needs at least {finding['ctx']['min_length']}"
    if kind == "too_long":
        return f": it takes {finding['ctx']['max_length']}"
    return ""


def _unknown(path: str, loc: tuple[Any, ...]) -> str:
    word = str(loc[-1])
    known = list(_keys_at(loc[:-1]))
    if len(loc) > 1:
        section = ".".join(map(str, loc[:-1]))
        return f"{path}: unknown key.{nearest(word, known) or f' The keys of {section} are {choices(known)}.'}"
    hint = nearest(word, known)
    for section in [] if hint else known:
        if word in _keys_at((section,)):
            hint = f" Did you mean '{section}.{word}'?"
    return f"{path}: unknown section.{hint or f' The sections are {choices(known)}.'}"


def _path(loc: tuple[Any, ...]) -> list[Any]:
    """`loc` without pydantic's names of union branches at its end."""
    path: list[Any] = []
    annotation: Any = Config
    for part in loc:
        inner = _inner(annotation, part)
        if inner is None and not _is_model(annotation):
            break
        path.append(part)
        annotation = inner
    return path


def _keys_at(loc: tuple[Any, ...]) -> Iterator[str]:
    annotation: Any = Config
    for part in loc:
        annotation = _inner(annotation, part)
    if _is_model(annotation):  # not what is passed through, whose keys are not ours
        yield from _plain(annotation).model_fields


def _description(loc: tuple[Any, ...]) -> str:
    """What a missing key is, from its docstring."""
    annotation: Any = Config
    for part in loc[:-1]:
        annotation = _inner(annotation, part)
    model = _plain(annotation)
    text = model.model_fields[loc[-1]].description if _is_model(model) and loc[-1] in model.model_fields else None
    return f" ({' '.join(text.split()).rstrip('.')})" if text else ""


def _is_model(annotation: Any) -> bool:
    annotation = _plain(annotation)
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _plain(annotation: Any) -> Any:
    """An annotation without `Annotated` and `| None`."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        others = [a for a in get_args(annotation) if a is not type(None)]
        return _plain(others[0]) if len(others) == 1 else annotation
    return annotation


def _inner(annotation: Any, part: Any) -> Any:
    """The annotation of a model's field, or of a list's, tuple's or mapping's element; None where there is none."""
    annotation = _plain(annotation)
    if _is_model(annotation):
        field = annotation.model_fields.get(part)
        return field.annotation if field else None
    if get_origin(annotation) is dict:
        return get_args(annotation)[1]
    return get_args(annotation)[0] if get_origin(annotation) in (list, tuple) and isinstance(part, int) else None
