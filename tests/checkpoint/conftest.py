from __future__ import annotations

from compressed_models import copied, stored

__all__ = ["copied", "stored"]
