"""GGUF files are parsed once while a model is opened.

transformers asks the package ``gguf`` to parse the whole file for the configuration, again for the tokenizer and again
for the weights, each time every token and merge of the vocabulary in Python; and it makes the table of tensor names
once per module of the model. Both depend on their arguments alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from threading import Lock
from typing import Any

_KEPT_FUNCTIONS = ("GGUFReader", "get_tensor_name_map")

_lock = Lock()
_originals: list[dict[str, Any]] = []
"""What the package had before, once for every block that is open."""


@contextmanager
def gguf_parsed_once() -> Iterator[None]:
    """Keep, until the end of the block, what these two functions of ``gguf`` returned; without the package, nothing.

    The package is changed for the whole process meanwhile, until the last of several blocks ends; who calls it from
    other threads gets what it would anyway.
    """
    try:
        import gguf
    except ImportError:
        yield
        return
    with _lock:
        if not _originals:
            found = {name: getattr(gguf, name) for name in _KEPT_FUNCTIONS if hasattr(gguf, name)}
            for name, function in found.items():
                setattr(gguf, name, lru_cache(maxsize=1)(function))
            _originals.append(found)
        else:
            _originals.append(_originals[0])
    try:
        yield
    finally:
        with _lock:
            last = _originals.pop()
            if not _originals:
                for name, function in last.items():
                    setattr(gguf, name, function)
