"""Which language a document is in, by py3langid: its model is inside of the package, so nothing is downloaded."""

from __future__ import annotations

from typing import Any

from megalm.data.curation.rules import Breach, Language
from megalm.errors import UserError, nearest

CHARACTERS = 4096  # that are looked at: more make it slower and hardly surer


class LanguageCheck:
    """The rule, its model loaded. A `UserError` names a language that the model does not know."""

    def __init__(self, rule: Language) -> None:
        self._rule = rule
        self._identifier = _load()
        known = set(self._identifier.labels)
        for name in rule.keep:
            if name not in known:
                raise UserError(
                    f"--language {name}: not a language that is known: give ISO 639 codes, as en or de."
                    f"{nearest(name, known)}"
                )

    def check(self, text: str) -> Breach | None:
        """The other language that the document is in, or how unsure it is."""
        name, confidence = self._identifier.classify(text[:CHARACTERS])
        detail = f"confidence {confidence:.2f}"
        if name not in self._rule.keep:
            return Breach(name, detail)
        if confidence < self._rule.min_confidence:
            return Breach(f"{name}, unsure", f"{detail}, at least {self._rule.min_confidence:g}")
        return None


def _load() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise UserError(
            "--language: needs the package py3langid: install it with `pip install 'megalm[curation]'`"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
