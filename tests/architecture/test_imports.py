"""The layer rule: who may import or include whom (ARCHITECTURE.md)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "cospadi"
CSRC = ROOT / "csrc"

EVERYWHERE = {"errors", "versions"}
"""Modules without imports of their own that any layer may use."""

LEARNERS = {"learn", "calibration", "model", "checkpoint", "report", "evaluation"}

MAY_IMPORT = {
    "errors": set(),
    "versions": set(),
    "native": {"_C", "native"},
    "reference": set(),
    "ops": {"native", "ops_cuda"},
    "ops_cuda": {"native"},
    "linear_op": {"ops", "ops_cuda", "native"},
    "factor": {"factor", "native"},
    "sparse_coding": {"native"},  # of use without a model
    "sparse_dictionary": {"sparse_coding"},
    **{name: LEARNERS | {"factor", "ops", "linear_op", "native"} for name in LEARNERS},
    # cospadi.load registers the transformers method, late, so that reading alone stays light
    "checkpoint": LEARNERS | {"factor", "ops", "native", "hf"},
    "pipeline": LEARNERS | {"pipeline", "factor", "ops", "native"},
    "cli": LEARNERS | {"cli", "pipeline", "factor", "ops", "native"},
    "integrations": {
        "integrations",
        "checkpoint.format",
        "checkpoint.reader",  # checks of a checkpoint's tensors before transformers loads them
        "checkpoint.safetensors_file",
        "model.huge_pages",
        "model.layers",
        "ops",
        "factor",
    },
    "hf": {"integrations"},
    "__init__": LEARNERS  # lazy public names
    | {"pipeline", "factor", "sparse_coding", "sparse_dictionary"},
    "sdk": set(),  # asked by build systems, which have no use for torch
    "__main__": {"cli", "sdk"},
}
"""First component (or longer prefix) of what each part of the package may import from cospadi."""


EXCEPTIONS = {
    # cospadi.load goes through from_pretrained, so it registers the method first; a late import,
    # because reading a checkpoint without a model must not cost transformers' import time
    ("checkpoint/load.py", "hf"),
}
"""(file, module): imports against the direction, each with its reason."""


def python_files():
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path):
    """Return the layer a file belongs to, for example ``learn`` or ``native``."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_modules(path):
    """Yield every module that a file imports, also inside functions, as a dotted name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the package uses absolute ones"
            if node.module == "cospadi":
                yield from (f"cospadi.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_import_direction(path):
    part = part_of(path)
    allowed = MAY_IMPORT[part] | EVERYWHERE
    for module in imported_modules(path):
        name = module.removeprefix("cospadi.")
        if not module.startswith("cospadi.") or name in ("__version__",):
            continue
        if (path.relative_to(PACKAGE).as_posix(), name) in EXCEPTIONS:
            continue
        is_allowed = any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)
        assert is_allowed, f"{part} must not import {module}; it may import {sorted(allowed)}"


def test_only_native_imports_the_extension():
    importers = {
        path.relative_to(PACKAGE).as_posix()
        for path in python_files()
        if "cospadi._C" in set(imported_modules(path))
    }
    assert importers and all(name.startswith("native/") for name in importers)


def test_reference_needs_torch_alone():
    outside = {module.split(".")[0] for module in imported_modules(PACKAGE / "reference.py")}
    assert outside - {"__future__", "dataclasses", "math", "typing"} == {"torch"}


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("cospadi", ["torch", "transformers", "numpy"]),
        ("cospadi.ops", ["transformers", "typer", "datasets"]),
        ("cospadi.sparse_coding", ["transformers", "typer", "sklearn"]),
        ("cospadi.cli.app", ["transformers"]),
        ("cospadi.sdk", ["torch", "transformers", "numpy", "typer", "cospadi._C"]),
    ],
)
def test_import_is_light(module, forbidden):
    program = f"import sys, {module}; print([m for m in {forbidden!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


# ---- C++ -----------------------------------------------------------------------------------------


def sources(folder):
    suffixes = {".hpp", ".cpp", ".inl", ".h", ".cu", ".cuh"}
    return sorted(path for path in (CSRC / folder).rglob("*") if path.suffix in suffixes)


def includes(path):
    pattern = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)
    return pattern.findall(path.read_text(encoding="utf-8"))


MAY_INCLUDE = {
    "include": ("cospadi/",),
    "core": ("cospadi/", "core/", "cpu/", "cuda/"),
    "cpu": ("cospadi/", "cpu/"),
    "cuda": ("cospadi/", "cuda/"),
    "bindings": ("cospadi/", "core/", "bindings/"),
    "onnx": ("cospadi/", "core/", "onnx/"),
}


@pytest.mark.parametrize("folder", MAY_INCLUDE)
def test_include_direction(folder):
    ours = ("cospadi/", "core/", "cpu/", "cuda/", "bindings/", "onnx/")
    assert sources(folder), folder
    for path in sources(folder):
        for header in includes(path):
            if header.startswith(ours):
                assert header.startswith(MAY_INCLUDE[folder]), f"{path} must not include {header}"


@pytest.mark.parametrize("folder", ["include", "core", "cpu", "cuda", "onnx"])
def test_no_python_or_torch_below_the_bindings(folder):
    forbidden = re.compile(r"^(torch|ATen|c10|pybind11|nanobind)/|^Python\.h$")
    for path in sources(folder):
        for header in includes(path):
            assert not forbidden.search(header), f"{path} must not include {header}"


@pytest.mark.parametrize("folder", ["include", "core", "bindings", "onnx"])
def test_intrinsics_only_in_cpu(folder):
    for path in sources(folder):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\b_mm(256|512)?_|\b__m(128|256|512)|immintrin|arm_neon", text), path
