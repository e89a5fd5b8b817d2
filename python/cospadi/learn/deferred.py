"""Checks of numbers on a GPU, gathered, so that a loop waits for the device once per turn and not at every check."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cospadi.errors import FitError


class DeferredChecks:
    """Factorisations whose success is looked at later, unless they ran on the CPU."""

    def __init__(self) -> None:
        self._pending: list[tuple[torch.Tensor, str]] = []

    def succeeded(self, info: torch.Tensor, message: str) -> None:
        """Remember that ``info`` (0-d, LAPACK's) must be zero; on the CPU look at once.

        Raises
        ------
        FitError
            With ``message``: ``info`` lies on the CPU and is not zero.
        """
        if not info.is_cpu:
            self._pending.append((info, message))
        elif int(info) != 0:
            raise FitError(message)

    def settle(self, flags: Sequence[torch.Tensor] = ()) -> list[bool]:
        """Read all pending results and ``flags`` (0-d) from the device at once.

        Returns
        -------
        list of bool
            The flags.

        Raises
        ------
        FitError
            With the message of the first factorisation that failed.
        """
        pending, self._pending = self._pending, []
        everything = [info for info, _ in pending] + list(flags)
        if not everything:
            return []
        values = torch.stack([value.int() for value in everything]).cpu().tolist()
        for value, (_, message) in zip(values, pending, strict=False):
            if value != 0:
                raise FitError(message)
        return [value != 0 for value in values[len(pending) :]]
