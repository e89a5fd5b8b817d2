"""Identity atoms beside learned ones."""

from __future__ import annotations

import pytest
import torch

from cospadi.errors import InputError
from cospadi.learn.augmented import fit_augmented
from cospadi.learn.baselines import sparsegpt
from cospadi.learn.budget import StorageWidths, augmented_sparsity, stored_bits
from cospadi.learn.group import relative_group_error
from cospadi.learn.member import Member
from cospadi.learn.methods import factor_size
from cospadi.learn.options import LearnOptions
from cospadi.learn.whitening import identity_whitening, whiten_gram

OPTIONS = LearnOptions()


def member(d_out=40, d_in=32, *, rank=0, seed=0, power=1.0):
    """A weight (plus a strong low-rank part) with an ill-conditioned activation Gram."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator)
    if rank:
        left = torch.randn(d_out, rank, generator=generator)
        weight = 0.3 * weight + left @ torch.randn(rank, d_in, generator=generator)
    mixing = torch.randn(d_in, d_in, generator=generator, dtype=torch.float64)
    mixing *= torch.arange(1, d_in + 1) ** -power
    gram = mixing @ mixing.T + 1e-6 * torch.eye(d_in, dtype=torch.float64)
    return Member(weight, whiten_gram(gram, "layer")), gram


def test_identity_atoms_alone_are_pruning_and_beat_one_shot_pruning():
    item, gram = member(96, 64)
    fit = fit_augmented([item], item.whitening, 0, 32, OPTIONS)
    factor = fit.factors[0]
    assert (factor.n_identity, factor.n_atoms) == (64, 0)
    assert bool(((factor.dense_weight() != 0).sum(1) <= 32).all())
    one_shot = sparsegpt(item.weight, gram, 32)
    errors = [item.error(f.dense_weight()) for f in (factor, one_shot)]
    assert errors[0] < errors[1]


def test_learned_atoms_find_the_low_rank_part():
    item, _ = member(rank=2)
    errors = {
        n_atoms: fit_augmented([item], item.whitening, n_atoms, 10, OPTIONS).exact_errors[0]
        for n_atoms in (0, 4)
    }
    assert errors[4] < 0.5 * errors[0]


def test_full_support_is_exact():
    item, _ = member()
    fit = fit_augmented([item], item.whitening, 0, 32, OPTIONS)
    assert fit.exact_errors[0] < 1e-5


def test_error_is_that_of_the_factor_and_unit_columns():
    item, _ = member(rank=2)
    fit = fit_augmented([item], item.whitening, 5, 12, OPTIONS)
    assert fit.exact_errors[0] == pytest.approx(relative_group_error([item], fit.factors))
    torch.testing.assert_close(
        fit.factors[0].dictionary.norm(dim=0), torch.ones(5, dtype=torch.float64)
    )
    assert fit.history[0].error_after_update <= fit.history[0].error_after_coding


def test_members_share_the_learned_atoms():
    items = [member(rank=2, seed=seed)[0] for seed in (1, 2)]
    fit = fit_augmented(items, identity_whitening(32), 6, 12, OPTIONS)
    assert fit.factors[0].dictionary is fit.factors[1].dictionary
    assert fit.exact_errors[0] < 1.0


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("n_atoms", [0, 1, 24])
@pytest.mark.parametrize(
    "widths",
    [StorageWidths(), StorageWidths(coeffs=4, coeffs_scaled=True, coeffs_group=64)],
)
def test_sizes_fill_the_budget_and_never_exceed_it(ratio, n_atoms, widths):
    d_in, d_out = 192, 100
    budget = (1 - ratio) * 16 * d_in * d_out
    s = augmented_sparsity(d_in, d_out, ratio, n_atoms=n_atoms, widths=widths)

    def bits(sparsity):
        full = sparsity == d_in + n_atoms
        return stored_bits(
            d_in,
            d_out,
            n_atoms,
            sparsity,
            n_identity=d_in,
            full_support=full,
            widths=widths,
        )

    assert bits(s) <= budget
    if s < d_in + n_atoms:
        assert bits(s + 1) > budget


def test_sizes_by_kind_of_dictionary():
    def size(kind, **options):
        return factor_size(
            "cospadi", 576, 1536, 0.4, widths=StorageWidths(), dictionary=kind, **options
        )

    identity, augmented = size("identity"), size("augmented", learned_share=0.1)
    assert (identity.n_identity, identity.n_atoms, identity.sparsity) == (576, 0, 309)
    assert (augmented.n_identity, augmented.n_atoms) == (576, 96)  # 0.1 * 0.6 * 1536 is 92.2
    assert augmented.sparsity < identity.sparsity
    assert size("learned").n_identity == 0
    assert size("augmented", learned_share=0.001).n_atoms == 1
    assert size("augmented", learned_share=0.99).sparsity == 0, "atoms without coefficients"


def test_learned_atoms_that_do_not_fit_leave_nothing():
    assert augmented_sparsity(64, 8, 0.5, n_atoms=64) == 0


def test_a_slower_rise_is_better():
    item, _ = member(96, 48, rank=3)
    errors = [
        fit_augmented(
            [item], item.whitening, 6, 16, LearnOptions(penalty_growth=growth)
        ).exact_errors[0]
        for growth in (2.0, 1.05)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("first_penalty", 0.0), ("first_penalty", 1.5), ("penalty_growth", 1.0)],
)
def test_options_out_of_range(name, value):
    with pytest.raises(InputError, match=name):
        LearnOptions(**{name: value})
