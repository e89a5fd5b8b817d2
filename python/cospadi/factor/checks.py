"""What must hold for the tensors of a compressed projection, whoever wrote them."""

from __future__ import annotations

import torch

from cospadi.errors import CheckpointError
from cospadi.factor.spec import TensorSpec, dtype_name


def check_tensor(tensor: torch.Tensor | None, expected: TensorSpec | None, name: str) -> None:
    """Check presence, type and shape, that floats are finite and that scales are positive."""
    if tensor is None and expected is None:
        return
    wanted = (
        "none" if expected is None else f"{' or '.join(expected.dtypes)} {list(expected.shape)}"
    )
    found = "none" if tensor is None else f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
    if (
        tensor is None
        or expected is None
        or dtype_name(tensor.dtype) not in expected.dtypes
        or tuple(tensor.shape) != expected.shape
    ):
        raise CheckpointError(f"{name}: expected {wanted}, got {found}")
    if tensor.is_floating_point():
        check_finite(tensor, name)
    if name.endswith("_scale") and bool((tensor <= 0).any()):
        raise CheckpointError(f"{name}: holds a scale that is not positive")


def check_finite(values: torch.Tensor, name: str) -> None:
    """Raise `CheckpointError` unless every value is a number."""
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{name}: holds a value that is not finite")


def check_integers(values: torch.Tensor, bits: int, name: str) -> None:
    """Raise `CheckpointError` where integers of ``bits`` bits hold the one that has no negative; [rows, columns]."""
    least = -(1 << (bits - 1))
    if bool((values == least).any()):
        row = int((values == least).any(dim=1).nonzero()[0])
        raise CheckpointError(f"{name}: row {row} holds {least}, expected at least {least + 1}")


def mask_to_bool(mask: torch.Tensor, n_atoms: int) -> torch.Tensor:
    """Expand a bit mask uint8 [rows, ceil(n_atoms / 8)] to bool [rows, n_atoms], on its device."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.unsqueeze(-1) >> shifts) & 1  # [rows, bytes, 8], lowest bit first
    return bits.reshape(mask.shape[0], -1)[:, :n_atoms].bool()


def check_mask(mask: torch.Tensor, n_atoms: int, sparsity: int, name: str) -> None:
    """Check that every row of a mask has `sparsity` bits and no padding bit.

    Plain torch, so that it also runs where the mask was loaded to.

    Parameters
    ----------
    mask : torch.Tensor
        uint8 [d_out, ceil(n_atoms / 8)].
    n_atoms, sparsity : int
        Atoms that a row has bits for, and bits that must be set.
    name : str
        Tensor name, for the message.

    Raises
    ------
    CheckpointError
        Naming the first bad row.
    """
    if n_atoms % 8 and bool((mask[:, -1] >> (n_atoms % 8)).any()):
        row = int((mask[:, -1] >> (n_atoms % 8)).nonzero()[0])
        raise CheckpointError(f"{name}: row {row} has a padding bit set beyond atom {n_atoms - 1}")
    # Population count of bytes by halves: no table, no wider type than the mask itself.
    pairs = mask - ((mask >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    counts = ((nibbles + (nibbles >> 4)) & 0x0F).sum(dim=1, dtype=torch.int64)
    wrong = counts != sparsity
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise CheckpointError(
            f"{name}: row {row} selects {int(counts[row])} atoms, expected {sparsity}"
        )
