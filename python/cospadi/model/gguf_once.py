"""GGUF files are parsed once while a model is opened.

transformers asks the package ``gguf`` to parse the whole file for the configuration, again for the tokenizer and again
for the weights, each time every token and merge of the vocabulary in Python; and it makes the table of tensor names
once per module of the model. Both depend on their arguments alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

_KEPT_FUNCTIONS = ("GGUFReader", "get_tensor_name_map")


@contextmanager
def gguf_parsed_once() -> Iterator[None]:
    """Keep, until the end of the block, what these two functions of ``gguf`` returned; without the package, nothing.

    The package is changed for the whole process meanwhile; who calls it from other threads gets what it would anyway.
    """
    try:
        import gguf
    except ImportError:
        yield
        return
    originals = {name: getattr(gguf, name) for name in _KEPT_FUNCTIONS if hasattr(gguf, name)}
    try:
        for name, function in originals.items():
            setattr(gguf, name, lru_cache(maxsize=1)(function))
        yield
    finally:
        for name, function in originals.items():
            setattr(gguf, name, function)
