from __future__ import annotations

from compressed_models import copied, copied_varied, stored, varied

__all__ = ["copied", "copied_varied", "stored", "varied"]
