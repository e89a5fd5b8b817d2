"""The programs of docs/cpp.md and README.md compile without a warning, run, and print what they say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "cpp.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```(cpp|c)\n(.*?)```", DOCUMENT, re.DOTALL)
COMMANDS = "".join(re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)).splitlines()
COMPILERS = {"cpp": ("c++", "-std=c++20"), "c": ("cc", "-std=c99")}


def build_and_run(sdk, text, language, folder, *arguments) -> subprocess.CompletedProcess[str]:
    """Compile a program, with every warning an error, and run it in the folder."""
    compiler, standard = COMPILERS[language]
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    source = folder / f"program.{language}"
    source.write_text(text)
    options = [standard, "-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{sdk.include_dir}"]
    command = [compiler, *options, source, sdk.library, f"-Wl,-rpath,{sdk.library.parent}"]
    program = folder / "program"
    done = subprocess.run([*command, "-o", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [program, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def run_commands(folder, *commands) -> str:
    """Give commands to a shell in the folder, with this environment's python; what the last one says."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in commands:
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=folder,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("index", range(len(PROGRAMS)))
def test_program(sdk, stored, tmp_path, index):
    language, text = PROGRAMS[index]
    arguments = [stored["llama"]] if "argv" in text else []
    done = build_and_run(sdk, text, language, tmp_path, *arguments)
    promised = re.search(r"printf.*// (.*)", text)
    if promised is not None:
        assert done.stdout.strip() == promised.group(1)
    else:
        assert done.stdout.startswith("model.layers.0.")


FRAME = """#include <cospadi/checkpoint.hpp>
#include <cstdio>
#include <vector>

int main() {
  std::vector<float> in(32, 1.0F), out(44);
  const cospadi::ConstTypedMatrix x{in.data(), cospadi::DType::kFloat32, 1, 32, 32};
  const cospadi::TypedMatrix y{out.data(), cospadi::DType::kFloat32, 1, 44, 44};
%s
  std::printf("%%g\\n", static_cast<double>(out[0]));
}
"""


def test_fragment_of_the_readme(sdk, stored, tmp_path):
    (fragment,) = re.findall(r"```cpp\n(.*?)```", README, re.DOTALL)
    (tmp_path / "small").symlink_to(stored["llama"])
    done = build_and_run(sdk, FRAME % fragment, "cpp", tmp_path)
    assert float(done.stdout) != 0.0


def test_project(sdk, stored, tmp_path):
    """The commands that configure a project find the library in the wheel and in an installation."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("cmake or c++ is not installed")
    (rules,) = re.findall(r"```cmake\n(.*?)```", DOCUMENT, re.DOTALL)
    install, from_wheel, from_prefix, _ = COMMANDS
    assert "cmake --install" in install  # conftest.py does it
    head = (
        "cmake_minimum_required(VERSION 3.25)\nproject(server CXX)\nadd_executable(server a.cpp)\n"
    )
    (tmp_path / "CMakeLists.txt").write_text(head + rules)
    (tmp_path / "a.cpp").write_text(PROGRAMS[0][1])
    configure = from_wheel
    if sdk.prefix is not None:
        configure = from_prefix.replace("=PREFIX", f"={sdk.prefix}")
    said = run_commands(
        tmp_path, configure, "cmake --build build", f"build/server {stored['llama']}"
    )
    assert said.startswith("model.layers.0.")


def test_without_cmake(sdk, stored, tmp_path):
    """The command for a single file compiles against the wheel's library, which the program finds where it lies."""
    if sdk.prefix is not None or shutil.which("c++") is None:
        pytest.skip("the wheel is not installed, or c++ is not")
    (tmp_path / "server.cpp").write_text(PROGRAMS[0][1])
    said = run_commands(tmp_path, COMMANDS[-1], f"./server {stored['llama']}")
    assert said.startswith("model.layers.0.")


def test_every_header_is_listed():
    for path in (ROOT / "csrc" / "include" / "cospadi").iterdir():
        assert f"`{path.name}`" in DOCUMENT, path.name
