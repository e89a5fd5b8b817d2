"""What ``inspect`` says of every kind of module, against the files."""

from __future__ import annotations

from math import prod

import pytest
from compressed_models import FAMILIES

from cospadi.checkpoint.reader import SINGLE_FILE, read_checkpoint
from cospadi.pipeline.inspect import inspect_checkpoint

CONVENTIONS = {"values", "mask16", "mask14", "stored", "file"}


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_and_ratios(varied, family):
    result = inspect_checkpoint(varied[family])
    checkpoint = read_checkpoint(varied[family])
    sizes = {name: prod(info.shape) for name, info in checkpoint.tensors.items()}
    modules = result["modules"]
    assert modules.keys() == checkpoint.data.modules.keys()
    for name, module in modules.items():
        assert module["stored_bytes"] == module["file_bytes"]
        assert module["dictionary"] == checkpoint.data.modules[name].leader
    assert result["ratio"]["linears"].keys() == result["ratio"]["model"].keys() == CONVENTIONS
    linears = result["bytes"]["linears"]
    assert linears["stored"] == linears["file"] == sum(m["stored_bytes"] for m in modules.values())
    ratio = result["ratio"]["linears"]
    assert ratio["stored"] == ratio["file"] == pytest.approx(1 - linears["file"] / linears["dense"])
    # every number of the model once: dense layers and biases as they are, factors by their sizes
    other = sum(
        size
        for name, size in sizes.items()
        if name.rpartition(".")[0] not in modules or name.endswith(".bias")
    )
    model = result["bytes"]["model"]
    assert model["dense"] == linears["dense"] + 2 * other
    assert model["stored"] == linears["stored"] + 2 * other
    assert model["file"] == (varied[family] / SINGLE_FILE).stat().st_size
    assert result["ratio"]["model"]["stored"] == pytest.approx(1 - model["stored"] / model["dense"])


def test_conventions_of_the_paper(stored):
    """Against the sizes of all modules of the plain checkpoint: K = 21, s = 9, the last one full."""
    result = inspect_checkpoint(stored["llama"])
    dense = values = mask = dropped = 0
    for module in result["modules"].values():
        d_in, d_out, k, s = (module[key] for key in ("d_in", "d_out", "n_atoms", "sparsity"))
        dense += d_in * d_out
        values += d_in * k + s * d_out
        if module["support"] == "mask":
            mask += k * d_out
            dropped += 2 * s * d_out
    ratio = result["ratio"]["linears"]
    assert dropped > 0
    assert ratio["values"] == pytest.approx(1 - values / dense)
    assert ratio["mask16"] == pytest.approx(1 - (16 * values + mask) / (16 * dense))
    assert ratio["mask14"] == pytest.approx(1 - (16 * values + mask - dropped) / (16 * dense))
