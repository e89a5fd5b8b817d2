"""Exception types of cospadi.

Every message is one line that names what was wrong (layer, argument, file), what was expected, what came, and how to
fix it. The command line maps the types to exit codes: 2 for `InputError` and `CudaUnavailableError`, 4 for
`VerificationError`, 1 for the others.
"""

from __future__ import annotations


class CospadiError(Exception):
    """Base class of every error that cospadi raises on purpose."""

    exit_code = 1


class InputError(CospadiError, ValueError):
    """An argument, a file or a model that the caller can fix."""

    exit_code = 2


class CheckpointError(InputError):
    """A compressed checkpoint that is damaged or inconsistent, or one of the types below."""


class NotCompressedError(CheckpointError):
    """There is no compressed checkpoint: no folder, no config, or a config without our compression."""


class NewerFormatError(CheckpointError):
    """A checkpoint that a newer version of cospadi made: not damaged, but not ours to read."""


class NativeError(CospadiError, RuntimeError):
    """The native library reported a failure that is not the caller's argument."""


class CudaUnavailableError(NativeError):
    """CUDA was asked for, but this build or this machine has none."""

    exit_code = 2


class FitError(CospadiError):
    """A fit gave nothing usable; the caller keeps the layer dense and reports it."""


class VerificationError(CospadiError):
    """A checkpoint does not hold what it states."""

    exit_code = 4


EXTRAS = {
    "gguf": ("gguf>=0.17", "accelerate>=1.0"),
    "datasets": ("datasets>=3",),
    "ray": ("ray>=2.40",),
    "onnx": ("onnxruntime>=1.16", "onnxscript>=0.5"),
    "sklearn": ("scikit-learn>=1.6",),
    "peft": ("peft>=0.21",),
    "eval": ("accelerate>=1.0", "lm-eval>=0.4.13,<0.5"),
}
"""What the extras of pyproject.toml install; a test compares them."""


def install_command(extra: str) -> str:
    """What installs the packages of an extra, by their own names: cospadi itself need not be on an index."""
    packages = " ".join(f'"{package}"' for package in EXTRAS[extra])
    return f"pip install {packages}"


def brief(value: object) -> str:
    """Represent an untrusted value on one short line."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
