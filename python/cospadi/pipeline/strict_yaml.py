"""YAML that may come from strangers: plain data, every key once, no aliases, bounded nesting."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

MAX_OPEN_BRACKETS = 200


class YamlError(ValueError):
    """What is wrong with a text, and in which line from 1 where that is known."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


def parse_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """The data of one document, and its nodes, which know their lines.

    Raises
    ------
    YamlError
        It is not valid YAML, nested too deeply, or has an alias or a key twice.
    """
    if _depth(text) > MAX_OPEN_BRACKETS:  # before parsing, which takes the square of it
        raise YamlError("nested too deeply")
    try:
        return yaml.load(text, Loader=_UniqueKeys), yaml.compose(text, Loader=_UniqueKeys)
    except RecursionError:
        raise YamlError("nested too deeply") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None)
        detail = f": {problem}" if problem else ""
        raise YamlError(
            f"not valid YAML{detail}", None if where is None else where.line + 1
        ) from None


class _UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, where YAML silently takes the last, and aliases.

    A few lines of aliases can stand for more entries than there is memory.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:  # noqa: ANN401
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"alias *{event.anchor!s:.40}: not used here", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, Hashable):
                continue  # refused below
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {name!r} is given twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def _depth(text: str) -> int:
    """Most brackets that are open at a time, wherever they stand."""
    depth = most = 0
    for mark in re.findall(r"[\[\]{}]", text):
        depth = max(0, depth + (1 if mark in "[{" else -1))
        most = max(most, depth)
    return most
