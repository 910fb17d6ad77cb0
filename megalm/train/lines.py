"""Files of one JSON object a line: questions and prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from megalm.errors import UserError

T = TypeVar("T", bound=BaseModel)


def read_lines(path: Path, kind: type[T], example: str) -> list[tuple[str, T]]:
    """Each line's place, `file:line`, and what it says. A line that is no `kind` is a UserError, which shows one."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            found.append((where, kind.model_validate_json(line, strict=True)))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            what = f"{key}: {first['msg']}" if key else first["msg"]
            raise UserError(f"{where}: {what}: write lines such as {example}") from None
    if not found:
        raise UserError(f"{path}: holds no line: write lines such as {example}")
    return found
