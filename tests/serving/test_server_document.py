"""The server's blocks of docs/serving.md: start it and ask it as written there, on another port."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

DOCUMENT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")

pytestmark = [pytest.mark.slow, pytest.mark.real_model]


def test_start_and_ask(serve, compressed_smollm2):
    start, ask = re.findall(r"```sh\n((?:python|curl) .*?)\n```", DOCUMENT, re.DOTALL)
    program, flag, name, model, folder, *options = start.split()
    assert (program, flag, model, folder) == ("python", "-m", "--model", "small")
    server = serve(compressed_smollm2("int8"), *options, "--enforce-eager", module=name).wait()
    done = subprocess.run(
        ask.replace(":8000/", f":{server.port}/"), shell=True, capture_output=True, check=True
    )
    assert json.loads(done.stdout)["choices"][0]["text"].strip()
