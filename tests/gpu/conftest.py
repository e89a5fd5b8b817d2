from __future__ import annotations

import sys
from pathlib import Path

# problems and compressed layers are made beside the tests that use them on the CPU
sys.path.append(str(Path(__file__).parents[1] / "kernels"))
sys.path.append(str(Path(__file__).parents[1] / "checkpoint"))
