from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

# the tiny compressed models are made beside the tests of the checkpoint
sys.path.append(str(Path(__file__).parents[1] / "checkpoint"))

from compressed_models import copied, copied_varied, stored, varied

__all__ = ["copied", "copied_varied", "stored", "varied"]


@dataclass(frozen=True)
class Sdk:
    """Where an installation has its C++ files; the prefix is that of ``cmake --install``, None for a wheel."""

    cmake_dir: Path
    include_dir: Path
    library: Path
    prefix: Path | None = None


def library_in(folder: Path) -> Path:
    """Return the shared library itself, not a link to it."""
    (library,) = (path for path in folder.glob("libcospadi.so*") if not path.is_symlink())
    return library


def ask_package(option: str) -> Path:
    result = subprocess.run(
        [sys.executable, "-m", "cospadi", option], capture_output=True, text=True, check=False
    )
    if result.returncode == 2 and "no C++ files" in result.stderr:
        pytest.skip("cospadi is not installed from its wheel: " + result.stderr.strip())
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


def wheel_sdk() -> Sdk:
    cmake_dir = ask_package("--cmake-dir")
    return Sdk(cmake_dir, ask_package("--include-dir"), library_in(cmake_dir.parent / "lib"))


def prefix_sdk(prefix: Path) -> Sdk:
    build = os.environ.get("COSPADI_BUILD_DIR")
    if not build:
        pytest.skip(
            "COSPADI_BUILD_DIR names no CMake build of the library (make cpp-test makes one)"
        )
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    subprocess.run(
        ["cmake", "--install", build, "--prefix", str(prefix), "--component", "sdk"],
        check=True,
        capture_output=True,
    )
    (config,) = prefix.rglob("cospadiConfig.cmake")
    return Sdk(config.parent, prefix / "include", library_in(config.parents[2]), prefix)


@pytest.fixture(scope="session", params=["wheel", "prefix"])
def sdk(request, tmp_path_factory) -> Sdk:
    """The C++ files of the installed wheel, and of ``cmake --install`` from COSPADI_BUILD_DIR."""
    if request.param == "wheel":
        return wheel_sdk()
    return prefix_sdk(tmp_path_factory.mktemp("prefix"))
