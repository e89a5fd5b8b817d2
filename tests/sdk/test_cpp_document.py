"""The programs of docs/cpp.md compile without a warning, run, and print what they say."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

DOCUMENT = (Path(__file__).parents[2] / "docs" / "cpp.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```(cpp|c)\n(.*?)```", DOCUMENT, re.DOTALL)
COMPILERS = {"cpp": ("c++", "-std=c++20"), "c": ("cc", "-std=c99")}


@pytest.mark.parametrize("index", range(len(PROGRAMS)))
def test_program(sdk, stored, tmp_path, index):
    language, text = PROGRAMS[index]
    compiler, standard = COMPILERS[language]
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    source = tmp_path / f"program.{language}"
    source.write_text(text)
    options = [standard, "-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{sdk.include_dir}"]
    command = [compiler, *options, source, sdk.library, f"-Wl,-rpath,{sdk.library.parent}"]
    program = tmp_path / "program"
    done = subprocess.run([*command, "-o", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    arguments = [stored["llama"]] if "argv" in text else []
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    promised = re.search(r"printf.*// (.*)", text)
    if promised is not None:
        assert done.stdout.strip() == promised.group(1)
    else:
        assert done.stdout.startswith("model.layers.0.")


def test_every_header_is_listed():
    for path in (Path(__file__).parents[2] / "csrc" / "include" / "cospadi").iterdir():
        assert f"`{path.name}`" in DOCUMENT, path.name
