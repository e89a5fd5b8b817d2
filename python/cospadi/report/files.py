"""A text file that is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from cospadi.errors import InputError


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text beside its place, then rename: a browser that reloads never sees half a page.

    A lone surrogate, which UTF-8 cannot hold, becomes a question mark.

    Raises
    ------
    InputError
        If the disk refuses.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(text.encode("utf-8", errors="replace"))
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(
            f"{target}: cannot be written ({error.strerror or error}); choose another output"
        ) from None
