"""The device of a run's fits, and what workers on other machines must have to compute the same bits there."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from cospadi import native
from cospadi.errors import CudaUnavailableError, InputError, brief

CUDA = "cuda"


@dataclass(frozen=True)
class DeviceKind:
    """What fits are computed on.

    Attributes
    ----------
    kind : str
        Type of the torch device.
    model : str
        Of the GPU; empty for the CPU, whose instruction set the run's own settings record.
    """

    kind: str = "cpu"
    model: str = ""


def checked_device(device: str) -> torch.device:
    """Return the device of a run.

    Raises
    ------
    InputError
        Neither ``cpu`` nor ``cuda``.
    CudaUnavailableError
        Torch finds no GPU, or this build of cospadi has no kernels for it.
    """
    if device == "cpu":
        return torch.device("cpu")
    if device != CUDA:
        raise InputError(f"device: expected cpu or cuda, got {brief(device)}")
    if not native.has_cuda_kernels():
        raise CudaUnavailableError(
            "device cuda: this build has no CUDA kernels; build it where nvcc is on PATH, or use --device cpu"
        )
    if not torch.cuda.is_available():
        raise CudaUnavailableError(
            "device cuda: torch finds no GPU (a build of torch for CUDA, and a driver, are needed); use --device cpu"
        )
    return torch.device(CUDA, torch.cuda.current_device())


def kind_of(device: torch.device) -> DeviceKind:
    """What others need to know about a device of this process."""
    if device.type == CUDA:
        return DeviceKind(CUDA, torch.cuda.get_device_name(device))
    return DeviceKind(device.type)


def same_device(wanted: DeviceKind, where: str) -> torch.device:
    """Device of this process for a run whose fits are computed on `wanted`.

    Raises
    ------
    CudaUnavailableError
        There is none.
    InputError
        It is of another model: results would differ.
    """
    try:
        device = checked_device(wanted.kind)
    except CudaUnavailableError as error:
        raise CudaUnavailableError(f"{where}: its fits run on {wanted.model}; {error}") from None
    own = kind_of(device)
    if own != wanted:
        raise InputError(
            f"{where}: this machine's GPU is another model than the run's ({own.model} here, {wanted.model} there): "
            "its results would differ; use equal GPUs"
        )
    return device


def visible_gpus() -> list[str]:
    """Names under which CUDA gives this process its GPUs, one at a time, to a child (``CUDA_VISIBLE_DEVICES``)."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    return [name.strip() for name in names[: torch.cuda.device_count()]]
