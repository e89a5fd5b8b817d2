"""Texts of errors that must agree with other files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cospadi.errors import EXTRAS, install_command

ROOT = Path(__file__).parents[1]


def test_packages_that_errors_name_are_those_of_the_extras():
    tomllib = pytest.importorskip("tomllib", reason="in Python from 3.11 on")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert {name: list(packages) for name, packages in EXTRAS.items()} == {
        name: packages for name, packages in extras.items() if name != "dev"
    }
    assert install_command("eval") == 'pip install "accelerate>=1.0" "lm-eval>=0.4.13,<0.5"'


def test_no_error_names_an_extra_of_a_package_that_is_on_no_index():
    for file in sorted((ROOT / "python").rglob("*.py")):
        found = re.findall(r"pip install\W+cospadi.*", file.read_text(encoding="utf-8"))
        assert not found, f"{file}: {found}"
