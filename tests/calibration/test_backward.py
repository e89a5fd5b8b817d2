"""Gradients of the model's own prediction: Fisher matrices and measured losses against direct computations."""

from __future__ import annotations

import pytest
import torch

from cospadi.calibration.backward import draw_labels, run_backwards
from cospadi.calibration.blockwise import BlockwiseDecoder, BlockwiseError
from cospadi.calibration.fisher import FisherStore, collect_fisher
from cospadi.calibration.probe import measure_losses
from cospadi.errors import InputError
from cospadi.model.discover import discover
from tiny_models import VOCABULARY, make_model


def token_ids(n=4, length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (n, length), generator=generator)


@pytest.fixture
def llama():
    model = make_model("llama").eval().requires_grad_(False)
    return model, discover(model)[0]


def rows_of(model, names, ids, seed):
    """Inputs and gradients that observers receive."""
    seen = {name: [] for name in names}
    observers = {
        name: lambda rows, gradient, name=name: seen[name].append((rows.clone(), gradient.clone()))
        for name in names
    }
    run_backwards(model, observers, ids, seed=seed)
    return {
        name: tuple(torch.cat(part).double() for part in zip(*batches, strict=True))
        for name, batches in seen.items()
    }


def test_gradients_are_those_of_a_change_of_the_output(llama):
    model, targets = llama
    name = targets[-1].name
    ids = token_ids(2, 12)
    rows, gradient = rows_of(model, [name], ids, 5)[name]
    assert rows.shape == (24, targets[-1].d_in)
    assert gradient.shape == (24, targets[-1].d_out)
    # the summed loss for the same labels, with the weight moved a little both ways
    drawn = _labels(model, ids, 5)
    weight = model.get_submodule(name).weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    original, losses = weight.clone(), []
    for sign in (1.0, -1.0):
        weight.copy_(original + sign * 1e-3 * direction)
        with torch.no_grad():
            logits = model(input_ids=ids).logits.reshape(-1, VOCABULARY).double()
        losses.append(torch.nn.functional.cross_entropy(logits, drawn, reduction="sum"))
    weight.copy_(original)
    slope = float(losses[0] - losses[1]) / 2e-3
    expected = float(((rows @ direction.double().T) * gradient).sum())
    assert slope == pytest.approx(expected, rel=2e-2)


def _labels(model, ids, seed):
    """The labels that `run_backwards` draws; all sequences fit in its first batch."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        logits = model(input_ids=ids).logits.reshape(-1, VOCABULARY).float()
    return draw_labels(logits, generator)


def test_labels_have_the_probabilities_of_the_model():
    logits = torch.tensor([-1e9, 1.0, 0.0, 3.0, -1e9, 2.0, -1e9])
    n = 40_000
    drawn = draw_labels(logits.expand(n, -1), torch.Generator().manual_seed(0))
    found = torch.bincount(drawn, minlength=7) / n
    expected = logits.softmax(0)
    deviation = (expected * (1 - expected) / n).sqrt()
    assert bool(((found - expected).abs() <= 4 * deviation).all())
    assert int(drawn.min()) >= 1 and int(drawn.max()) <= 5
    again = draw_labels(logits.expand(n, -1), torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    other = draw_labels(logits.expand(n, -1), torch.Generator().manual_seed(1))
    assert not torch.equal(drawn, other)


def test_labels_of_chunks_are_those_of_the_whole():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(2)
    parts = [draw_labels(part, generator) for part in logits.split(7)]
    whole = draw_labels(logits, torch.Generator().manual_seed(2))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral", "qwen3moe"])
def test_block_by_block_and_as_a_whole_are_the_same(family, monkeypatch):
    model = make_model(family).eval().requires_grad_(False)
    names = [target.name for target in discover(model)[0]]
    # several chunks of the head in every sequence
    monkeypatch.setattr("cospadi.calibration.backward.HEAD_VALUES", 7 * VOCABULARY)
    monkeypatch.setattr("cospadi.calibration.backward.HEAD_TOKENS", 7)
    ids = token_ids(3, 24)
    by_blocks = rows_of(model, names, ids, 3)

    def refuse(self, _ids):
        raise BlockwiseError("no")

    monkeypatch.setattr(BlockwiseDecoder, "prepare", refuse)
    whole = rows_of(model, names, ids, 3)
    for name in names:
        torch.testing.assert_close(by_blocks[name][0], whole[name][0], rtol=1e-5, atol=1e-6)
        scale = float(whole[name][1].abs().max())
        assert scale > 0.0
        assert float((by_blocks[name][1] - whole[name][1]).abs().max()) < 1e-4 * scale


def test_fisher_is_the_mean_outer_product(llama):
    model, targets = llama
    ids = token_ids()
    (finished,) = collect_fisher(model, targets, ids, seed=3)
    rows = rows_of(model, [t.name for t in targets], ids, 3)
    assert set(finished.matrices) == {t.name for t in targets}
    for target in targets:
        if target.name in finished.weighted_grams:
            continue
        gradient = rows[target.name][1]
        torch.testing.assert_close(
            finished.matrices[target.name].double(),
            gradient.T @ gradient / ids.numel(),
            rtol=1e-3,
            atol=1e-9,
        )


def test_concentrated_gradient_weighs_tokens():
    from cospadi.calibration.fisher import _Accumulator

    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 5, generator=generator)
    gradient = 1e-3 * torch.randn(200, 4, generator=generator)
    even = _Accumulator(4)
    even.observe(rows, gradient)
    assert even.gram is None
    gradient[7] *= 1000.0
    peaked = _Accumulator(4)
    peaked.observe(rows, gradient)
    energies = gradient.square().sum(1)
    torch.testing.assert_close(peaked.gram, (rows * energies[:, None]).T @ rows)
    weights = torch.einsum("ti,ij,tj->t", rows, rows.T @ rows, rows)
    weights /= weights.mean()
    torch.testing.assert_close(peaked.matrix, (gradient * weights[:, None]).T @ gradient)


def test_several_passes_give_the_same(llama):
    model, targets = llama
    ids = token_ids()
    (whole,) = collect_fisher(model, targets, ids, seed=3)
    largest = max(4 * t.d_out**2 for t in targets)
    parts = list(collect_fisher(model, targets, ids, seed=3, max_bytes=2 * largest))
    assert len(parts) > 1
    assert parts[0].n_passes == len(parts)
    together = {name: matrix for part in parts for name, matrix in part.matrices.items()}
    assert together.keys() == whole.matrices.keys()
    for name, matrix in whole.matrices.items():
        torch.testing.assert_close(together[name], matrix)


@pytest.fixture
def some_concentrated(monkeypatch):
    """In a tiny model at random no gradient is concentrated but by another standard."""
    monkeypatch.setattr("cospadi.calibration.fisher.CONCENTRATED", 0.6)


def test_diagonals_are_those_of_the_matrices(llama, tmp_path, some_concentrated):
    model, targets = llama
    ids = token_ids()
    (whole,) = collect_fisher(model, targets, ids, seed=3)
    assert 0 < len(whole.weighted_grams) < len(targets)
    (diagonals,) = collect_fisher(model, targets, ids, seed=3, is_diagonal=True)
    for name, matrix in whole.matrices.items():
        torch.testing.assert_close(diagonals.matrices[name], matrix.diagonal(), rtol=1e-4, atol=0.0)
    assert diagonals.weighted_grams.keys() == whole.weighted_grams.keys()

    store = FisherStore(tmp_path, model, ids, weights="w", seed=3, is_diagonal=True)
    assert store.prepare(targets) > 0.0
    assert store.prepare(targets) == 0.0
    victims = sorted(tmp_path.iterdir())[:3]
    victims[0].write_bytes(victims[0].read_bytes()[:-3])
    content = bytearray(victims[1].read_bytes())
    content[-40] ^= 1
    victims[1].write_bytes(content)
    assert store.prepare(targets) > 0.0
    full = FisherStore(tmp_path, model, ids, weights="w", seed=3)
    full.prepare(targets)
    for target in targets:
        torch.testing.assert_close(
            store.load_diagonal(target).float(), whole.matrices[target.name].diagonal()
        )
        torch.testing.assert_close(full.load_diagonal(target), full.load(target).diagonal())
        weighted = store.load_weighted_gram(target)
        assert (weighted is not None) == (target.name in whole.weighted_grams)


def test_passes_over_diagonals_are_planned_by_the_grams_of_their_inputs(llama, some_concentrated):
    model, targets = llama
    ids = token_ids()
    (whole,) = collect_fisher(model, targets, ids, seed=3, is_diagonal=True)
    bound = 4 * max(t.d_in for t in targets) ** 2
    parts = list(collect_fisher(model, targets, ids, seed=3, is_diagonal=True, max_bytes=bound))
    assert len(parts) > 1
    for part in parts:
        assert sum(4 * gram.numel() for gram in part.weighted_grams.values()) <= bound
        for name, diagonal in part.matrices.items():
            torch.testing.assert_close(diagonal, whole.matrices[name])


def test_store_reads_what_it_wrote_and_repairs_what_was_damaged(llama, tmp_path):
    model, targets = llama
    ids = token_ids()
    store = FisherStore(tmp_path, model, ids, weights="w", seed=3)
    assert store.prepare(targets) > 0.0
    (whole,) = collect_fisher(model, targets, ids, seed=3)
    for target in targets:
        torch.testing.assert_close(store.load(target).float(), whole.matrices[target.name])
        weighted = store.load_weighted_gram(target)
        assert (weighted is not None) == (target.name in whole.weighted_grams)
    assert store.prepare(targets) == 0.0
    other = FisherStore(tmp_path, model, ids, weights="w", seed=4)
    assert other.prepare(targets[:1]) > 0.0
    victim = sorted(tmp_path.iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:-3])
    store.prepare(targets)
    other.prepare(targets[:1])
    for target in targets:
        torch.testing.assert_close(store.load(target).float(), whole.matrices[target.name])


def test_measured_loss_is_half_the_mean_square_of_gradient_times_change(llama):
    model, targets = llama
    ids = token_ids()
    generator = torch.Generator().manual_seed(9)
    changes = {
        t.name: [1e-2 * torch.randn(t.d_out, t.d_in, generator=generator) for _ in range(2)]
        for t in targets[:5]
    }
    losses = measure_losses(model, changes, ids, seed=3)
    rows = rows_of(model, list(changes), ids, 3)
    for name, items in changes.items():
        inputs, gradient = rows[name]
        for change, loss in zip(items, losses[name], strict=True):
            moved = ((inputs @ change.double().T) * gradient).sum(1)
            assert loss == pytest.approx(0.5 * float(moved.square().mean()), rel=1e-4)


def test_measured_loss_predicts_the_divergence(llama):
    """The last projection of the last block acts on its own token alone, so nothing is left out."""
    model, targets = llama
    target = targets[-1]
    weight = model.get_submodule(target.name).weight
    change = (
        0.05 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    )
    ids = token_ids(24, 24)
    repeated = [
        measure_losses(model, {target.name: [change]}, ids, seed=seed)[target.name][0]
        for seed in range(8)
    ]
    with torch.no_grad():
        before = model(input_ids=ids).logits.double().log_softmax(-1)
        weight.sub_(change)
        after = model(input_ids=ids).logits.double().log_softmax(-1)
        weight.add_(change)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert sum(repeated) / 8 == pytest.approx(divergence, rel=0.15)


def test_non_finite_gradient_names_the_module(llama):
    model, targets = llama
    name = targets[-1].name

    def spoil(_module, _inputs, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))

    model.get_submodule(name).register_forward_hook(spoil)
    with pytest.raises(InputError, match=f"{name}: the gradient at its output is not finite"):
        list(collect_fisher(model, targets, token_ids(), seed=3))


def test_non_finite_logits(llama):
    model, targets = llama
    model.get_output_embeddings().weight.fill_(float("inf"))
    with pytest.raises(InputError, match="logits are not finite"):
        list(collect_fisher(model, targets, token_ids(), seed=3))


def test_ids_that_do_not_fit(llama):
    model, targets = llama
    with pytest.raises(InputError, match=r"\[n_samples, length\]"):
        list(collect_fisher(model, targets, token_ids()[0], seed=3))
    with pytest.raises(InputError):
        measure_losses(model, {}, token_ids() + 10**6)
