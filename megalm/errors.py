"""What a user can get wrong ends in a `UserError`: one line that says what, where and how to mend it; exit code 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: key or path, value, rule, mend."""


class RunFailed(Exception):
    """A failure on some rank ended a run on all. The message is one line, empty on ranks that leave it to another."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the known word closest to `word`, or an empty string."""
    matches = get_close_matches(word, list(known), n=1)
    return f" Did you mean '{matches[0]}'?" if matches else ""
