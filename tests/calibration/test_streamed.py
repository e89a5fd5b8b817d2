"""A streamed model gives the Grams of the loaded one, bit for bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cospadi.calibration.fisher import collect_fisher
from cospadi.calibration.probe import measure_losses
from cospadi.calibration.statistics import collect_grams
from cospadi.calibration.streamed import HiddenStates, collect_streamed_grams
from cospadi.errors import InputError
from cospadi.model.discover import discover
from cospadi.model.source import open_source
from cospadi.model.streamed import StreamingUnsupported, open_streamed


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, 380, (5, 48), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("is_bounded", [False, True])
def test_grams_have_the_bits_of_the_loaded_model(
    family, spilled, is_bounded, ids, tiny_model_dir, tmp_path
):
    loaded, streamed = open_source(tiny_model_dir(family)), open_streamed(tiny_model_dir(family))
    assert streamed.fingerprint == loaded.fingerprint
    targets, _ = discover(loaded.model)
    again, _ = discover(streamed.model)
    assert again == targets
    expected = {}
    for finished in collect_grams(loaded.model, targets, ids, batch_size=2):
        expected |= finished.grams
    found = {}
    for finished in collect_streamed_grams(
        streamed,
        targets,
        ids,
        batch_size=2,
        max_gram_bytes=(600_000 if family == "gpt2" else 250_000) if is_bounded else None,
        folder=tmp_path if spilled else None,
    ):
        assert all(p.is_meta for p in streamed.model.parameters())
        found |= finished.grams
    assert found.keys() == expected.keys()
    for key, gram in expected.items():
        assert torch.equal(gram.gram, found[key].gram), key
        assert (gram.members, gram.n_tokens) == (found[key].members, found[key].n_tokens)
    assert list(tmp_path.iterdir()) == []


def fisher_of(model, targets, ids, **options):
    found, grams = {}, {}
    for finished in collect_fisher(model, targets, ids, seed=3, **options):
        found |= finished.matrices
        grams |= finished.weighted_grams
    return found, grams


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("is_diagonal", [False, True])
@pytest.mark.parametrize("is_bounded", [False, True])
def test_gradients_have_the_bits_of_the_loaded_model(
    family, is_diagonal, is_bounded, tiny_model_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr("cospadi.calibration.fisher.CONCENTRATED", 0.6)
    monkeypatch.setattr("cospadi.calibration.backward.BATCH_TOKENS", 100)  # two samples and one
    monkeypatch.setattr("cospadi.calibration.backward.HEAD_VALUES", 20 * 384)
    monkeypatch.setattr("cospadi.calibration.backward.HEAD_TOKENS", 7)
    ids = torch.randint(2, 380, (5, 48), generator=torch.Generator().manual_seed(0))
    loaded, streamed = open_source(tiny_model_dir(family)), open_streamed(tiny_model_dir(family))
    targets, _ = discover(loaded.model)
    largest = 4 * max(t.d_in if is_diagonal else t.d_out for t in targets) ** 2
    options = {"is_diagonal": is_diagonal, "max_bytes": largest if is_bounded else None}
    expected, expected_grams = fisher_of(loaded.model, targets, ids, is_diagonal=is_diagonal)
    steps = []
    found, grams = fisher_of(
        streamed,
        targets,
        ids,
        folder=tmp_path,
        progress=lambda done, total: steps.append((done, total)),
        **options,
    )
    assert found.keys() == expected.keys()
    assert grams.keys() == expected_grams.keys()
    for name, matrix in expected.items():
        assert float(matrix.abs().max()) > 0.0
        assert torch.equal(found[name], matrix), name
    for name, gram in expected_grams.items():
        assert torch.equal(grams[name], gram), name
    assert steps == sorted(steps)
    assert list(tmp_path.iterdir()) == []
    assert all(p.is_meta for p in streamed.model.parameters())


def test_gradients_of_some_blocks_only(tiny_model_dir, tmp_path):
    ids = torch.randint(2, 380, (2, 48), generator=torch.Generator().manual_seed(0))
    loaded, streamed = open_source(tiny_model_dir("llama")), open_streamed(tiny_model_dir("llama"))
    last = [t for t in discover(loaded.model)[0] if t.block == 1][2:4]
    expected, _ = fisher_of(loaded.model, last, ids)
    found, _ = fisher_of(streamed, last, ids, folder=tmp_path)
    assert found.keys() == expected.keys() == {t.name for t in last}
    changes = {t.name: [torch.ones(t.d_out, t.d_in)] for t in last}
    losses = measure_losses(loaded.model, changes, ids, seed=2)
    assert measure_losses(streamed, changes, ids, seed=2, folder=tmp_path) == losses
    assert min(value for (value,) in losses.values()) > 0.0


def test_a_folder_that_cannot_hold_hidden_states(tiny_model_dir, tmp_path):
    ids = torch.randint(2, 380, (2, 48), generator=torch.Generator().manual_seed(0))
    streamed = open_streamed(tiny_model_dir("llama"))
    targets, _ = discover(streamed.model)
    with pytest.raises(InputError, match="missing: cannot hold"):
        fisher_of(streamed, targets, ids, folder=tmp_path / "missing")
    assert all(p.is_meta for p in streamed.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_are_those_of_the_loaded_model(family, tiny_model_dir):
    loaded, streamed = open_source(tiny_model_dir(family)), open_streamed(tiny_model_dir(family))
    for target in discover(loaded.model)[0]:
        for one, other in zip(loaded.weight(target), streamed.weight(target), strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)


def test_a_target_subset_stops_early_and_names_every_target(ids, tiny_model_dir):
    streamed = open_streamed(tiny_model_dir("llama"))
    targets = [t for t in discover(streamed.model)[0] if t.block == 0]
    (finished,) = collect_streamed_grams(streamed, targets, ids)
    members = [name for gram in finished.grams.values() for name in gram.members]
    assert sorted(members) == sorted(t.name for t in targets)


def test_fused_experts_must_be_loaded(tiny_model_dir):
    with pytest.raises(StreamingUnsupported, match=r"no tensor model\.layers\.0\.mlp"):
        open_streamed(tiny_model_dir("mixtral"))


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda t: t["model.norm.weight"].fill_(float("nan")), InputError, "norm.*64 non-finite"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(65)}),
            InputError,
            r"model.norm.weight is \[65\]",
        ),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), StreamingUnsupported, "up_proj"),
    ],
)
def test_damaged_weights_are_named(edit, error, message, damaged_dir):
    change(damaged_dir, edit)
    with pytest.raises(error, match=message):
        open_streamed(damaged_dir)


def test_surplus_tensors_are_noted(damaged_dir):
    change(damaged_dir, lambda t: t.update(extra=torch.ones(3)))
    assert "first extra, not used" in open_streamed(damaged_dir).notes[0]


def test_hidden_states_come_back(tmp_path):
    values = torch.randn(5, 3, 4)
    for folder in (None, tmp_path):
        hidden = HiddenStates((5, 3, 4), folder)
        for part in (slice(0, 2), slice(2, 5)):
            hidden.put(part, values[part])
        assert torch.equal(hidden.get(slice(1, 4)), values[1:4])
        hidden.get(slice(0, 5)).zero_()
        assert torch.equal(hidden.get(slice(0, 5)), values)
        hidden.close()


def test_a_folder_that_cannot_hold_them_is_an_error(tmp_path):
    with pytest.raises(InputError, match="cannot hold"):
        HiddenStates((1, 2, 3), tmp_path / "missing")


def test_scaled_rotary_frequencies_are_those_of_the_loaded_model(tiny_model_dir, tmp_path, ids):
    """Buffers that no file holds are computed when the model is built."""
    folder = shutil.copytree(tiny_model_dir("llama"), tmp_path / "scaled")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0}
    (folder / "config.json").write_text(json.dumps(config))
    loaded, streamed = open_source(folder), open_streamed(folder)
    targets, _ = discover(loaded.model)
    (expected,) = collect_grams(loaded.model, targets, ids)
    found = {}
    for finished in collect_streamed_grams(streamed, targets, ids):
        found |= finished.grams
    for key, gram in expected.grams.items():
        assert torch.equal(gram.gram, found[key].gram), key
