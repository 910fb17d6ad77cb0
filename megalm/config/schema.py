"""The config's JSON schema, for editors and for reading."""

from __future__ import annotations

from typing import Any

from megalm.config.presets import PRESETS
from megalm.config.sections import Config


def schema() -> dict[str, Any]:
    """The JSON schema of a config file. Every key's description is its docstring.

    It asks for less than loading does: the shape's keys are not required, as a preset may give them.
    """
    result = Config.model_json_schema()
    model = result["$defs"]["Model"]
    required = model.pop("required")
    model["anyOf"] = [{"required": ["preset"]}, {"required": required}]
    preset = model["properties"]["preset"]
    preset["anyOf"] = [{"enum": list(PRESETS)}, {"type": "null"}]
    return result
