"""What other programs find: headers that compile alone, and a library that shows nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HEADERS = Path(__file__).parents[2] / "csrc" / "include"


def tool(*names: str) -> str:
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    return found


def run(*command: object) -> str:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def marked_names() -> set[str]:
    """Return the names of the functions and classes that the headers mark as public."""
    names: set[str] = set()
    for path in HEADERS.rglob("*.h*"):
        if path.name == "export.h":
            continue
        text = path.read_text(encoding="utf-8")
        names.update(re.findall(r"COSPADI_API [^;{(]*?(\w+)\s*\(", text))
        names.update(re.findall(r"class COSPADI_API (\w+)", text))
    return names


def exported_names(library: Path) -> set[str]:
    """Return what `library` exports: functions by their name, members by that of their class."""
    names = set()
    for line in run(tool("nm"), "-DC", "--defined-only", library).splitlines():
        symbol = line.split(maxsplit=2)[2]
        inside = re.search(r"\bcospadi::(\w+)(?=\W|$)", re.sub(r"\(.*|<.*", "", symbol))
        if inside is None:  # a template's result comes before its name
            inside = re.search(r"\bcospadi::(\w+)<\w+>\(", symbol)
        names.add(symbol if symbol.startswith("cospadi_") else inside and inside.group(1))
    return names


def test_the_library_shows_the_public_interface_alone(sdk):
    marked = marked_names()
    assert {"sparse_gemm", "omp_encode", "cospadi_layer_forward", "Layer", "Error"} <= marked
    exported = exported_names(sdk.library)
    # the result type of a template's instance stands before its name
    exported -= {"OmpStats", "AtomUpdateStats"}
    assert exported <= marked
    assert marked - exported <= {"omp_encode", "update_atoms"}
    text = run(tool("nm"), "-DC", "--defined-only", sdk.library)
    for function in ("omp_encode", "update_atoms"):
        assert text.count(f"cospadi::{function}<") == 2  # float and double
    assert "detail::" not in text
    assert "Impl" not in text


def test_the_library_needs_neither_python_nor_torch(sdk):
    dynamic = run(tool("readelf"), "-d", sdk.library)
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert any(name.startswith("libgomp") for name in needed)
    assert not any(re.search("python|torch|c10", name) for name in needed)
    assert re.search(r"SONAME.*\[libcospadi\.so\.0\.1\]", dynamic)
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_all_headers_are_installed(sdk):
    ours = {path.relative_to(HEADERS) for path in HEADERS.rglob("*.h*")}
    theirs = {path.relative_to(sdk.include_dir) for path in sdk.include_dir.rglob("cospadi/*.h*")}
    assert ours == theirs


def test_every_header_compiles_alone(sdk, tmp_path):
    compiler = tool("c++", "g++", "clang++")
    for path in sorted(sdk.include_dir.rglob("cospadi/*.hpp")):
        source = tmp_path / "one.cpp"
        source.write_text(f"#include <cospadi/{path.name}>\n")
        options = ("-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror")
        run(compiler, *options, f"-I{sdk.include_dir}", source)


@pytest.mark.parametrize("header", ["c_api.h", "export.h"])
def test_c_headers_are_c99(sdk, tmp_path, header):
    source = tmp_path / "one.c"
    source.write_text(f"#include <cospadi/{header}>\nint main(void) {{ return 0; }}\n")
    options = ("-std=c99", "-pedantic", "-fsyntax-only", "-Wall", "-Wextra", "-Werror")
    run(tool("cc", "gcc", "clang"), *options, f"-I{sdk.include_dir}", source)


@pytest.mark.parametrize("option", ["--cmake-dir", "--include-dir", "--onnx-library"])
def test_places_are_printed_without_torch(option):
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['cospadi', '{option}']\n"
        "try: runpy.run_module('cospadi', run_name='__main__')\n"
        "except SystemExit as end: code = end.code\n"
        "print(code, [m for m in ('torch', 'typer', 'cospadi._C') if m in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    *place, last = result.stdout.splitlines()
    assert last in ("0 []", "2 []")
    if last == "2 []":  # an installation without C++ files says so
        assert "no C++ files" in result.stderr
    else:
        assert Path(place[0]).exists()
