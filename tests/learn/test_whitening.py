"""The whitening ladder on ordinary and adversarial Grams."""

from __future__ import annotations

import pytest
import torch

from cospadi.errors import InputError
from cospadi.learn.whitening import (
    WhiteningError,
    identity_whitening,
    relative_error,
    whiten_gram,
)


def random_gram(
    d: int, tokens: int, seed: int = 0, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(tokens, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x * torch.logspace(0, -2, d, dtype=torch.float64) * scale
    return x, x.T @ x / tokens


def test_whitened_norm_is_the_output_norm():
    x, gram = random_gram(24, 200)
    weight = torch.randn(10, 24, dtype=torch.float64)
    whitening = whiten_gram(gram, "layer")
    assert whitening.kind == "cholesky"
    assert whitening.steps == ("cholesky",)
    direct = (x @ weight.T).norm() ** 2 / x.shape[0] / whitening.scale
    assert whitening.whiten(weight).norm() ** 2 == pytest.approx(float(direct), rel=1e-10)


@pytest.mark.parametrize("kind", ["regular", "singular"])
def test_unwhitening_inverts_whitening(kind):
    _, gram = random_gram(24, 200 if kind == "regular" else 12)
    whitening = whiten_gram(gram, "layer")
    dictionary = torch.randn(24, 7, dtype=torch.float64)
    back = whitening.unwhiten_atoms(whitening.whiten_atoms(dictionary))
    torch.testing.assert_close(back, dictionary, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_scale_does_not_matter(scale):
    _, gram = random_gram(16, 100)
    weight = torch.randn(5, 16, dtype=torch.float64)
    torch.testing.assert_close(
        whiten_gram(gram * scale, "layer").whiten(weight),
        whiten_gram(gram, "layer").whiten(weight),
        rtol=1e-9,
        atol=1e-12,
    )


def adversarial() -> dict[str, torch.Tensor]:
    d = 20
    one = torch.randn(d, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    _, full = random_gram(d, 100)
    duplicated = full.clone()
    duplicated[1], duplicated[:, 1] = full[0], full[:, 0]
    duplicated[1, 1] = full[0, 0]
    dead = full.clone()
    dead[4], dead[:, 4] = 0.0, 0.0
    return {
        "rank one": one @ one.T,
        "fewer tokens than channels": random_gram(d, 6)[1],
        "duplicated channel": duplicated,
        "dead channel": dead,
        "slightly indefinite": full
        - 1e-12 * torch.eye(d, dtype=torch.float64) * full.diagonal().mean(),
        "huge": full * 1e30,
        "spread of 1e15": torch.diag(torch.logspace(0, -15, d, dtype=torch.float64)),
        "negative direction": full
        - 0.5 * full.diagonal().mean() * torch.eye(d, dtype=torch.float64),
    }


@pytest.mark.parametrize("case", sorted(adversarial()))
def test_ladder_always_ends_in_a_finite_factor_and_says_how(case):
    whitening = whiten_gram(adversarial()[case], "layer")
    assert torch.isfinite(whitening.factor).all()
    assert whitening.steps
    atoms = torch.eye(20, dtype=torch.float64)
    assert torch.isfinite(whitening.unwhiten_atoms(atoms)).all()
    if case == "dead channel":
        assert "1 of 20 input channels" in whitening.steps[0]
    if case in ("rank one", "negative direction"):
        assert whitening.kind == "eigen" or whitening.shift > 0


def test_zero_gram_is_a_whitening_error():
    with pytest.raises(WhiteningError, match=r"model\.layer.*zero"):
        whiten_gram(torch.zeros(4, 4), "model.layer")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gram_is_refused(bad):
    gram = torch.eye(4, dtype=torch.float64)
    gram[1, 2] = bad
    with pytest.raises(InputError, match=r"model\.layer.*non-finite"):
        whiten_gram(gram, "model.layer")


def test_identity_whitening_changes_nothing():
    weight = torch.randn(3, 6)
    torch.testing.assert_close(identity_whitening(6).whiten(weight), weight.double())


def test_relative_error_is_that_of_the_outputs():
    x, gram = random_gram(12, 80)
    weight = torch.randn(9, 12, dtype=torch.float64)
    other = weight + 0.1 * torch.randn(9, 12, dtype=torch.float64)
    direct = (x @ (weight - other).T).norm() / (x @ weight.T).norm()
    assert relative_error(gram, weight, other) == pytest.approx(float(direct), rel=1e-9)
    assert relative_error(gram, weight, weight) == 0.0
    assert relative_error(gram, torch.zeros_like(weight), weight) == float("inf")
