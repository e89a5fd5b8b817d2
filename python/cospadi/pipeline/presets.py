"""Named settings to start from: ``preset: paper`` in a recipe, ``--preset paper`` on the command line.

They are YAML files in ``preset_files``, each with the reason for its values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_FOLDER = Path(__file__).with_name("preset_files")

PRESETS: dict[str, dict[str, Any]] = {
    name: yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    for name in ("fast", "paper", "best")
}
