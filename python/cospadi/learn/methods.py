"""The methods by name: what each stores, and how large that is at a ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cospadi.errors import InputError
from cospadi.learn.budget import (
    RatioConvention,
    StorageWidths,
    augmented_sparsity,
    low_rank_size,
    sparse_size,
)

Form = Literal["dictionary", "low-rank", "pruned", "rounded"]

DictionaryKind = Literal["learned", "identity", "augmented", "auto"]
"""Atoms of the method ``cospadi``: K learned ones, the d_in identity atoms, both, or what is best for the weight."""

OTHER_SHARES = (0.1, 0.35)
"""Shares of learned atoms that ``auto`` tries beside the wanted one."""


@dataclass(frozen=True)
class Method:
    """One way to fit a weight.

    Attributes
    ----------
    summary : str
        For ``--help`` and reports.
    form : {"dictionary", "low-rank", "pruned", "rounded"}
        What is stored: a dictionary with a sparse code; one with a dense code (full support); a part of the weight's
        own values; all of them in few bits.
    uses_calibration : bool
        False: the fit never looks at activations.
    can_share : bool
        Whether several weights may share one dictionary.
    orthonormal : bool
        The dictionary starts as an orthonormal basis, which has at most ``min(d_in, d_out)`` atoms.
    """

    summary: str
    form: Form
    uses_calibration: bool = True
    can_share: bool = False
    orthonormal: bool = False

    @property
    def has_ratio(self) -> bool:
        """False where the storage type alone decides the size."""
        return self.form != "rounded"


METHODS: dict[str, Method] = {
    "cospadi": Method("sparse dictionary learning in whitened space", "dictionary", can_share=True),
    "svd-llm": Method("whitened truncated SVD", "low-rank"),
    "svd": Method("plain truncated SVD", "low-rank", uses_calibration=False),
    "basis-sharing": Method(
        "whitened truncated SVD with a basis for several layers", "low-rank", can_share=True
    ),
    "compot": Method("orthonormal dictionary, Procrustes", "dictionary", orthonormal=True),
    "rocket": Method("one-shot eigen basis with thresholding", "dictionary", orthonormal=True),
    "magnitude": Method("largest weights of each output", "pruned", uses_calibration=False),
    "wanda": Method("largest weight times input norm of each output", "pruned"),
    "sparsegpt": Method("optimal brain surgeon pruning", "pruned"),
    "rtn": Method("round-to-nearest integers", "rounded", uses_calibration=False),
    "gptq": Method("integers with error feedback", "rounded"),
}


@dataclass(frozen=True)
class FactorSize:
    """Sizes of one factor, or of the factors that share a dictionary.

    Attributes
    ----------
    n_identity, n_atoms : int
        Identity atoms (``d_in`` or 0) and learned atoms.
    sparsity : int
        Coefficients per output; 0 if nothing fits.
    """

    n_identity: int
    n_atoms: int
    sparsity: int

    @property
    def full_support(self) -> bool:
        """Whether every output uses every atom, so that no mask is stored."""
        return self.sparsity == self.n_identity + self.n_atoms


def factor_size(
    method: str,
    d_in: int,
    d_out: int,
    ratio: float,
    *,
    k_over_s: float = 2.0,
    convention: RatioConvention = "stored",
    widths: StorageWidths,
    dictionary: DictionaryKind = "learned",
    learned_share: float = 0.1,
) -> FactorSize:
    """Sizes that a method gets for a ratio.

    Parameters
    ----------
    method : str
        Key of `METHODS`.
    d_in, d_out : int
        Of the weight; ``d_out`` summed over the members of a group.
    ratio, k_over_s, convention, widths
        See `cospadi.learn.budget.sparse_size`.
    dictionary : {"learned", "identity", "augmented", "auto"}
        Atoms of the method ``cospadi``; ``auto`` is planned as ``augmented`` (see `candidate_sizes`).
    learned_share : float
        Part of the budget that an augmented dictionary spends on learned atoms.

    Raises
    ------
    InputError
        Unknown method, or a setting out of range.
    """
    if method not in METHODS:
        raise InputError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    entry = METHODS[method]
    if entry.form == "rounded":
        return FactorSize(d_in, 0, d_in)
    if entry.form == "pruned":
        kept = augmented_sparsity(d_in, d_out, ratio, convention=convention, widths=widths)
        return FactorSize(d_in, 0, kept)
    if entry.form == "low-rank":
        rank = low_rank_size(d_in, d_out, ratio, convention=convention, widths=widths)
        return FactorSize(0, rank, rank)
    if method == "cospadi" and dictionary != "learned":
        n_atoms = 0
        if dictionary != "identity":
            n_atoms = learned_atoms(d_out, ratio, learned_share)
        sparsity = augmented_sparsity(
            d_in, d_out, ratio, n_atoms=n_atoms, convention=convention, widths=widths
        )
        return FactorSize(d_in, n_atoms, sparsity)
    n_atoms, sparsity = sparse_size(
        d_in,
        d_out,
        ratio,
        k_over_s=k_over_s,
        convention=convention,
        widths=widths,
        max_atoms=min(d_in, d_out) if entry.orthonormal else None,
    )
    return FactorSize(0, n_atoms, sparsity)


def candidate_sizes(
    d_in: int,
    d_out: int,
    ratio: float,
    *,
    k_over_s: float = 2.0,
    convention: RatioConvention = "stored",
    widths: StorageWidths,
    learned_share: float = 0.1,
) -> tuple[FactorSize, ...]:
    """Sizes among which ``auto`` chooses, all within one budget: the planned one first.

    Augmented dictionaries with several shares of learned atoms, identity atoms alone, a truncated SVD, and a code over
    learned atoms alone. What does not fit is left out.

    Parameters
    ----------
    d_in, d_out, ratio, k_over_s, convention, widths, learned_share
        See `factor_size`.
    """

    def size(method: str, dictionary: DictionaryKind, share: float = learned_share) -> FactorSize:
        return factor_size(
            method,
            d_in,
            d_out,
            ratio,
            k_over_s=k_over_s,
            convention=convention,
            widths=widths,
            dictionary=dictionary,
            learned_share=share,
        )

    found = [size("cospadi", "augmented")]
    found += [size("cospadi", "augmented", share) for share in OTHER_SHARES]
    found += [size("cospadi", "identity"), size("svd-llm", "learned"), size("cospadi", "learned")]
    return tuple(dict.fromkeys(one for one in found if one.sparsity))


def learned_atoms(d_out: int, ratio: float, share: float) -> int:
    """Learned atoms whose bf16 values take ``share`` of a budget: ``share (1 - ratio) d_out``.

    To the nearest multiple of 8 (of 1 below 8), at least one. Relative to the budget and not to ``d_in``, because what
    an atom costs its weight is coefficients of every output: with few outputs few atoms pay.
    """
    wanted = share * (1.0 - ratio) * d_out
    return max(round(wanted / 8) * 8, 8) if wanted >= 4 else max(round(wanted), 1)
