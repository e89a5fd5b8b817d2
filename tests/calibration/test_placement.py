"""A model on another device for a while, and its activation Grams collected there."""

from __future__ import annotations

import pytest
import torch

from cospadi.calibration.blockwise import BlockwiseDecoder, BlockwiseError
from cospadi.calibration.cache import collect_cached_grams
from cospadi.calibration.fisher import collect_fisher
from cospadi.calibration.placement import placed
from cospadi.calibration.statistics import collect_grams
from cospadi.errors import InputError
from cospadi.model.discover import decoder_blocks, discover
from pretend_device import DEVICE, PretendTensor, pretended_device
from tiny_models import make_model

FAMILIES = ("llama", "qwen2", "gpt2")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 384, (5, 24), generator=torch.Generator().manual_seed(0))


def check_close(found, expected):
    """Equal but for the order of float32 sums."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale)


def n_moved(module):
    return sum(type(tensor) is PretendTensor for tensor in module.parameters())


def grams_of(passes):
    return {
        name: gram.gram
        for finished in passes
        for gram in finished.grams.values()
        for name in gram.members
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("free_bytes", [None, 1])
def test_blocks_are_there_while_they_run_and_everything_comes_back(family, free_bytes, ids):
    model = make_model(family).requires_grad_(False)
    before = {name: id(tensor) for name, tensor in model.named_parameters()}
    expected = model(input_ids=ids).logits
    blocks = [block for _, block in decoder_blocks(model)]
    with pretended_device():
        with placed(model, DEVICE, free_bytes=free_bytes) as placement:
            assert placement.is_resident == (free_bytes is None)
            present = [n_moved(block) > 0 for block in blocks]
            assert present == [placement.is_resident] * len(blocks)
            if free_bytes:
                with placement.hold(blocks[1]):
                    model(input_ids=ids.to(DEVICE))
                    assert [n_moved(block) > 0 for block in blocks] == [False, True]
            found = model(input_ids=ids.to(DEVICE)).logits
            assert found.device == DEVICE
            assert [n_moved(block) > 0 for block in blocks] == present
            torch.testing.assert_close(found.cpu(), expected)
        assert n_moved(model) == 0
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == before


def test_an_error_inside_brings_everything_back(ids):
    model = make_model("llama").requires_grad_(False)
    blocks = [block for _, block in decoder_blocks(model)]

    def fail(*_):
        raise RuntimeError("in the middle")

    blocks[0].mlp.register_forward_hook(fail)
    with pretended_device():
        with placed(model, DEVICE, free_bytes=1):
            with pytest.raises(RuntimeError, match="in the middle"):
                model(input_ids=ids.to(DEVICE))
            assert n_moved(blocks[0]) == 0
        assert n_moved(model) == 0


def test_what_needs_all_blocks_is_refused_where_they_do_not_fit():
    model = make_model("llama")
    with (
        pretended_device(),
        pytest.raises(InputError, match=r"are more than 50% of the 7 that are free"),
        placed(model, DEVICE, whole=True, free_bytes=7),
    ):
        pass


def test_the_own_device_changes_nothing():
    model = make_model("llama")
    for device in (None, torch.device("cpu")):
        with placed(model, device, free_bytes=1) as placement:
            assert placement.is_resident and placement.device == torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_gram_bytes", [None, 8 * 160 * 160 * 2])
@pytest.mark.parametrize("fits", [True, False])
def test_grams_are_those_of_the_cpu(family, max_gram_bytes, fits, ids, monkeypatch):
    model = make_model(family).requires_grad_(False)
    targets, _ = discover(model)
    if family == "gpt2" and max_gram_bytes is not None:
        max_gram_bytes = 8 * 256 * 256
    options = {"batch_size": 2, "max_gram_bytes": max_gram_bytes}
    expected = grams_of(collect_grams(model, targets, ids, **options))
    monkeypatch.setattr("cospadi.calibration.placement.RESIDENT_SHARE", 1.0 if fits else 0.0)
    real = placed
    monkeypatch.setattr(
        "cospadi.calibration.blockwise_statistics.placed",
        lambda model, device: real(model, device, free_bytes=1 << 40),
    )
    steps = []
    with pretended_device():
        passes = list(
            collect_grams(
                model,
                targets,
                ids,
                device=DEVICE,
                progress=lambda done, total: steps.append((done, total)),
                **options,
            )
        )
    assert (len(passes) > 1) == (max_gram_bytes is not None)
    found = grams_of(passes)
    assert found.keys() == expected.keys()
    for name, gram in found.items():
        assert type(gram) is torch.Tensor
        check_close(gram, expected[name])
    assert steps[-1][0] == steps[-1][1]
    assert n_moved(model) == 0


def test_a_model_that_cannot_run_by_blocks_runs_as_a_whole(ids, monkeypatch):
    model = make_model("llama").requires_grad_(False)
    targets, _ = discover(model)
    expected = grams_of(collect_grams(model, targets, ids, batch_size=2))

    def refuse(self, _ids):
        raise BlockwiseError("no")

    monkeypatch.setattr(BlockwiseDecoder, "prepare", refuse)
    with pretended_device():
        found = grams_of(collect_grams(model, targets, ids, batch_size=2, device=DEVICE))
    for name, gram in found.items():
        assert type(gram) is torch.Tensor
        check_close(gram, expected[name])


def test_cached_grams_of_devices_are_kept_apart(ids, tmp_path):
    model = make_model("llama").requires_grad_(False)
    targets, _ = discover(model)
    options = {"folder": tmp_path, "weights": "w", "batch_size": 2, "report": print}
    here = grams_of(collect_cached_grams(model, targets, ids, **options))
    n_files = len(list(tmp_path.iterdir()))
    with pretended_device():
        there = [
            grams_of(collect_cached_grams(model, targets, ids, device=DEVICE, **options))
            for _ in range(2)
        ]
    assert len(list(tmp_path.iterdir())) == 2 * n_files
    for name, gram in here.items():
        check_close(there[0][name], gram)
        assert torch.equal(there[0][name], there[1][name])


@pytest.mark.parametrize("free_bytes", [None, 1])
def test_fisher_matrices_are_those_of_the_cpu(free_bytes, ids):
    model = make_model("llama").requires_grad_(False)
    targets, _ = discover(model)
    ((expected),) = list(collect_fisher(model, targets, ids, seed=3))
    with pretended_device(), placed(model, DEVICE, free_bytes=free_bytes):
        (found,) = list(collect_fisher(model, targets, ids, seed=3))
        assert found.matrices.keys() == expected.matrices.keys()
        for name, matrix in found.matrices.items():
            assert matrix.device == DEVICE
            check_close(matrix.cpu(), expected.matrices[name])
