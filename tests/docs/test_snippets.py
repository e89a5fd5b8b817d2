"""Every fenced block of README.md and docs/*.md runs as pasted, or is listed here with the reason why not."""

from __future__ import annotations

import ast
import sys
import warnings
from importlib.util import find_spec

import pytest
from snippets import DOCUMENTS, ROOT, Block, blocks_of, commands_of, words_of

from cospadi.cli import app
from cospadi.pipeline.recipe_file import recipe_from_mapping

NOT_RUN = {
    "make ": "makes environments, downloads a model or runs these tests",
    "pip ": "would change this environment; done by hand in a clean one",
    "cospadi eval small --tasks": "reads data sets; tests/evaluation runs tasks from files",
    "cospadi compare MODEL": "a process for every cell, minutes; tests/pipeline/test_compare.py",
}
"""Commands by their beginning."""

ELSEWHERE = {
    ("README.md", "cpp"): "tests/sdk/test_cpp_document.py",
    ("docs/cpp.md", "cpp"): "tests/sdk/test_cpp_document.py",
    ("docs/cpp.md", "c"): "tests/sdk/test_cpp_document.py",
    ("docs/cpp.md", "cmake"): "tests/sdk/test_cpp_document.py",
    ("docs/cpp.md", "sh"): "tests/sdk/test_cpp_document.py",
    ("docs/serving.md", "python"): "tests/integrations/test_serving_document.py",
    ("docs/serving.md", "sh"): "tests/integrations/test_serving_document.py",
}
"""Blocks that another module runs, by document and language."""

NEEDS = {"SparseDictionary": "sklearn"}
"""Packages of extras, by a word of the blocks that need them."""


def own_blocks(document: str) -> list[Block]:
    return [b for b in blocks_of(document) if (document, b.language) not in ELSEWHERE]


def reason_not_to_run(command: str) -> str | None:
    """The key of NOT_RUN for a command."""
    words = " ".join(words_of(command))
    return next((beginning for beginning in NOT_RUN if words.startswith(beginning)), None)


def run_command(command: str, where: str, monkeypatch, capsys) -> None:
    words = words_of(command)
    assert words[0] == "cospadi", f"{where}: {command!r} is neither run nor listed in NOT_RUN"
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert stop.value.code == 0, f"{where}: {command}\n{capsys.readouterr().err}"


def run_python(block: Block) -> None:
    if any(word in block.text and find_spec(name) is None for word, name in NEEDS.items()):
        return
    program = compile(block.text, block.place, "exec")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other packages'; pytest makes errors of them
        exec(program, {"__name__": "__main__"})


def run_recipe(block: Block) -> None:
    import yaml

    recipe_from_mapping(yaml.safe_load(block.text), source=block.place)


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if own_blocks(d)])
def test_the_blocks_run_as_pasted_in_order(document, place, monkeypatch, capsys):
    place((ROOT / document).read_text(encoding="utf-8"))
    for block in own_blocks(document):
        if block.language == "sh":
            for command in commands_of(block):
                if reason_not_to_run(command) is None:
                    run_command(command, block.place, monkeypatch, capsys)
        elif block.language == "python":
            run_python(block)
        elif block.language == "yaml":
            run_recipe(block)
        else:
            pytest.fail(f"{block.place}: {block.language!r} is neither run nor in ELSEWHERE")


def test_no_exception_is_left_over():
    commands = [
        command
        for document in DOCUMENTS
        for block in own_blocks(document)
        if block.language == "sh"
        for command in commands_of(block)
    ]
    assert {reason_not_to_run(command) for command in commands} - {None} == set(NOT_RUN)
    for (document, language), module in ELSEWHERE.items():
        assert any(block.language == language for block in blocks_of(document)), document
        names = [
            node.value
            for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant)
        ]
        assert document.rpartition("/")[2] in names, f"{module} does not read {document}"


def test_blocks_and_commands_are_found():
    text = "a\n```sh\none 'a # b' x#y   # c\n# d\ntwo \\\n  three\n```\n```python\nx = 1\n```\n"
    shell, python = blocks_of("a.md", text)
    assert (shell.language, shell.line, python.line) == ("sh", 2, 8)
    assert commands_of(shell) == ["one 'a # b' x#y", "two    three"]
    assert words_of(commands_of(shell)[1]) == ["two", "three"]
    for broken in ("```sh\nx\n", "  ```sh\n  x\n  ```\n", "```a-b\nx\n```\n"):
        with pytest.raises(AssertionError):
            blocks_of("a.md", broken)
