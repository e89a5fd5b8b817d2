from __future__ import annotations

import sys
from pathlib import Path

# the tiny compressed models are made beside the tests of the checkpoint
sys.path.append(str(Path(__file__).parents[1] / "checkpoint"))

from compressed_models import copied, copied_varied, stored, varied

__all__ = ["copied", "copied_varied", "stored", "varied"]
