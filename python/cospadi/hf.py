"""``import cospadi.hf`` makes transformers' ``from_pretrained`` load compressed checkpoints."""

from __future__ import annotations

from cospadi.integrations.transformers import register

register()
