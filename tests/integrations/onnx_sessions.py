"""Sessions of ONNX Runtime with our operator library."""

from __future__ import annotations

from pathlib import Path

import pytest

from cospadi import sdk
from cospadi.errors import CospadiError


@pytest.fixture(scope="module")
def library() -> str:
    """Path of the operator library; without it the test is skipped."""
    try:
        return str(sdk.onnx_library())
    except CospadiError as error:
        pytest.skip(str(error))


def open_session(model: bytes | Path, library: str, **config: str):
    """Open a model, given as bytes or as a file; an underscore in a setting's name stands for a dot."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # failures come as exceptions
    for key, value in config.items():
        options.add_session_config_entry(key.replace("_", "."), value)
    options.register_custom_ops_library(library)
    return ort.InferenceSession(model if isinstance(model, bytes) else str(model), options)
