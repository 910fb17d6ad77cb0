"""What a run is: typed sections, read from YAML with overrides and model presets."""

from __future__ import annotations

from megalm.config.load import load_config, resolve
from megalm.config.sections import Config
from megalm.config.text import to_yaml
