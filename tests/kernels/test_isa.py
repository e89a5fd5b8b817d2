"""The kernel tests once per instruction set of this machine, through COSPADI_ISA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cospadi import native

HERE = Path(__file__).parent
SUITE = (
    "test_gemm.py",
    "test_linear.py",
    "test_mask.py",
    "test_packed.py",
    "test_round_code.py",
    "test_select.py",
    "test_sparse_gemm.py",
)


def run(arguments, isa):
    environment = os.environ | {"COSPADI_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_suite(isa):
    info = native.runtime_info()
    if isa not in info["available_isas"]:
        pytest.skip(f"this processor has {', '.join(info['available_isas'])} only")
    if isa == info["isa"]:
        pytest.skip(f"{isa} is what the tests of this process use")
    files = [str(HERE / name) for name in SUITE]
    result = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *files], isa)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def test_environment_chooses():
    program = "from cospadi import native; print(native.runtime_info()['isa'])"
    result = run(["-c", program], "generic")
    assert result.stdout.strip() == "generic", result.stderr


def test_unknown_name_lists_what_is_available():
    program = "from cospadi import native; native.runtime_info()"
    result = run(["-c", program], "sse9")
    assert result.returncode != 0
    message = "COSPADI_ISA=sse9 is unknown or not available on this processor; available: generic"
    assert message in result.stderr
    assert "InputError" in result.stderr
