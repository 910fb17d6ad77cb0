"""Config text: YAML and `key=value` overrides to plain dicts, and a config back to YAML.

YAML here has the scalars of YAML 1.2's core schema: `1e-3` is a number, `on`, `no` and dates are text, 010 is ten. A
key given twice is an error. PyYAML parses the text to nodes and builds no objects; tags are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from megalm.config.sections import Config
from megalm.errors import UserError

Raw = dict[str, Any]

_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?[0-9][0-9_]*\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_SPECIAL_FLOAT = re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z")
_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")  # what nodes without a tag have
_MOST_DIGITS = 40  # Python refuses to read more than 4,300
_MOST_VALUES = 100_000  # aliases of aliases grow without end


class _Problem(Exception):
    """What is wrong with a piece of YAML, and where."""

    def __init__(self, what: str, mark: yaml.Mark) -> None:
        super().__init__(what)
        self.mark = mark


def _where(place: str, text: str, mark: yaml.Mark | None) -> str:
    return f"{place}:{mark.line + 1}:{mark.column + 1}" if mark and "\n" in text else place


def parse_yaml(text: str, place: str) -> Any:
    """The plain value of a YAML document. `place` says in error messages where the text is from."""
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        return None if node is None else _build(node, iter(range(_MOST_VALUES)))
    except _Problem as problem:
        raise UserError(f"{_where(place, text, problem.mark)}: {problem}") from None
    except yaml.MarkedYAMLError as error:
        where = _where(place, text, error.problem_mark)
        raise UserError(
            f"{where}: {error.problem}: check brackets and indentation, and quote text with special characters"
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"{place}: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise UserError(f"{place}: nested too deeply") from None


def read_yaml(path: Path) -> Raw:
    """The top-level mapping of a YAML file."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: give the path of a YAML config") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8: save the config as UTF-8 text") from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        what = "is empty" if raw is None else "holds no mapping"
        raise UserError(f"{path} {what}: write sections such as `run: {{dir: runs/first}}`")
    return raw


def apply_overrides(raw: Raw, overrides: Sequence[str]) -> Raw:
    """A copy of `raw` with each `section.key=value` set, later ones last. List elements go by index (`sources.0`)."""
    raw = deepcopy(raw)
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise UserError(f"override '{override}' is not key=value: write, for example, batch.global_size=64")
        _set(raw, keys, _parse_override(path, text))
    return raw


def merged(under: Raw, over: Raw) -> Raw:
    """`over`, and what only `under` says, at every depth."""
    both = {**under, **over}
    for key in under.keys() & over.keys():
        if isinstance(under[key], dict) and isinstance(over[key], dict):
            both[key] = merged(under[key], over[key])
    return both


def to_yaml(config: Config | Raw) -> str:
    """The config, or some of its sections, as YAML in their order; loading it gives an equal config."""
    sections = config.model_dump(mode="json") if isinstance(config, Config) else config
    document = _Dumper(StringIO(), sort_keys=False).represent_data(sections)
    for _, section in document.value:
        section.flow_style = False
        for _, value in section.value:
            _flow_leaves(value)
    return str(yaml.serialize(document, Dumper=_Dumper, allow_unicode=True, width=1 << 30))


class _Dumper(yaml.SafeDumper):
    """Quotes what `parse_yaml` would take for a number, as well as what YAML 1.1 would; escapes odd line breaks."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = None if data.isprintable() else '"'  # PyYAML itself would fold a U+0085 into a space
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)
_Dumper.add_implicit_resolver("tag:megalm,2026:int", _INT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:megalm,2026:float", _FLOAT, list("-+.0123456789"))


def _build(node: yaml.Node, budget: Iterator[int]) -> Any:
    """The plain value of a node; `budget` has an item for each value that may still be made."""
    if next(budget, None) is None:
        raise _Problem(f"more than {_MOST_VALUES} values: no config is so large", node.start_mark)
    if node.tag not in _TAGS:
        raise _Problem(f"the tag {node.tag} is not known: remove it", node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, budget) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        mapping: Raw = {}
        for key_node, value_node in node.value:
            key = _build(key_node, budget)
            if not isinstance(key, str):
                raise _Problem(f"the key {key} is not text: quote it", key_node.start_mark)
            if key in mapping:
                raise _Problem(f"the key '{key}' is given twice: keep one", key_node.start_mark)
            mapping[key] = _build(value_node, budget)
        return mapping
    assert isinstance(node, yaml.ScalarNode)
    if node.style:
        return node.value
    if len(node.value) > _MOST_DIGITS and _INT.match(node.value):
        raise _Problem(f"{node.value[:10]}... has {len(node.value)} digits: write a smaller number", node.start_mark)
    return plain_scalar(node.value)


def plain_scalar(text: str) -> Any:
    """What an unquoted scalar means."""
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    if _INT.match(text):
        return int(text.replace("_", ""))
    if _FLOAT.match(text):
        return float(text.replace("_", ""))
    if _SPECIAL_FLOAT.match(text):
        return float(text.replace(".", ""))
    return text


def _parse_override(path: str, text: str) -> Any:
    value = parse_yaml(text, f"{path}={text}")
    if value is None and text.strip().startswith("#"):
        raise UserError(f"{path}={text}: # starts a comment in YAML: quote the value, for example '{path}=\"{text}\"'")
    return value


def _set(raw: Raw, keys: Sequence[str], value: Any) -> None:
    """Sets raw[keys[0]][keys[1]]... to `value`; sections that are missing are made."""
    here: Any = raw
    for depth, key in enumerate(keys):
        path = ".".join(keys[:depth])
        if isinstance(here, list):
            if not key.isascii() or not key.isdigit() or int(key) >= len(here):
                indices = f"0 to {len(here) - 1}" if here else "none, as it is empty"
                raise UserError(f"{path}.{key}: {path} is a list: its elements are {indices}")
        elif not isinstance(here, dict):
            raise UserError(f"{'.'.join(keys)}: {path} is a value, not a section: set {path}={value} alone")
        at: Any = int(key) if isinstance(here, list) else key
        if depth == len(keys) - 1:
            here[at] = value
        else:
            if isinstance(here, dict) and here.get(at) is None:
                here[at] = {}
            here = here[at]


def _flow_leaves(node: yaml.Node) -> bool:
    """Puts innermost lists and mappings on one line. Says if `node` is a scalar."""
    if isinstance(node, yaml.ScalarNode):
        return True
    assert isinstance(node, yaml.CollectionNode)
    children = [v for _, v in node.value] if isinstance(node, yaml.MappingNode) else node.value
    scalars = [_flow_leaves(child) for child in children]
    node.flow_style = all(scalars)
    return False
