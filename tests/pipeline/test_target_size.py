"""A budget in bytes for the whole model."""

from __future__ import annotations

import pytest

from cospadi.errors import InputError
from cospadi.pipeline.compress import compress
from cospadi.pipeline.recipe import Override, Recipe
from cospadi.pipeline.verify import verify_checkpoint

SETTINGS = {"samples": 4, "sequence_length": 64}


def weight_bytes(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def dense_bytes(tiny_model_dir, tiny_text, tmp_path_factory):
    """Bytes of the tiny model in bfloat16, all of it and outside the linears."""
    out = tmp_path_factory.mktemp("size") / "out"
    result = compress(
        tiny_model_dir("llama"), out, calibration=str(tiny_text), bits=8.5, **SETTINGS
    )
    rest = weight_bytes(out) - result.stored_bytes
    return rest + result.dense_bytes, rest


@pytest.mark.parametrize("share", [0.3, 0.5])
@pytest.mark.parametrize("coeffs", [None, "bfloat16"])
def test_the_weights_take_no_more(share, coeffs, dense_bytes, tiny_model_dir, tiny_text, tmp_path):
    dense, rest = dense_bytes
    wanted = rest + int(share * (dense - rest))
    settings = SETTINGS | (
        {} if coeffs is None else {"coeffs_dtype": coeffs, "dictionary": "identity"}
    )
    out = tmp_path / "out"
    compress(
        tiny_model_dir("llama"), out, calibration=str(tiny_text), target_size=wanted, **settings
    )
    assert (0.95 if coeffs is None else 0.8) * wanted < weight_bytes(out) <= wanted


@pytest.mark.parametrize("bits", [4.6, 8.0])
def test_bits_between_two_widths_are_used(bits, tiny_model_dir, tiny_text, tmp_path):
    out = tmp_path / "out"
    result = compress(
        tiny_model_dir("llama"), out, calibration=str(tiny_text), bits=bits, **SETTINGS
    )
    weights = sum(module.d_in * module.d_out for module in result.plan.modules)
    assert bits - 0.25 < 8 * result.stored_bytes / weights <= bits
    assert len({module.coeffs_dtype for module in result.plan.modules}) > 1
    verify_checkpoint(out)


def test_overrides_have_their_bytes_first(dense_bytes, tiny_model_dir, tiny_text, tmp_path):
    dense, rest = dense_bytes
    wanted = rest + int(0.5 * (dense - rest))
    recipe = Recipe(
        **SETTINGS,
        calibration=str(tiny_text),
        target_size=wanted,
        coeffs_dtype="auto",
        overrides=(Override(r".*down_proj", dense=True),),
    )
    out = tmp_path / "out"
    result = compress(tiny_model_dir("llama"), out, recipe)
    assert not [name for name in result.reports if name.endswith("down_proj")]
    assert 0.8 * wanted < weight_bytes(out) <= wanted


def test_impossible_sizes_are_refused(dense_bytes, tiny_model_dir, tiny_text, tmp_path):
    dense, rest = dense_bytes
    for size, message in (
        (rest // 2, "embeddings, norms, overrides"),
        (2 * dense, "no more than"),
    ):
        with pytest.raises(InputError, match=message):
            compress(
                tiny_model_dir("llama"),
                tmp_path / "out",
                calibration=str(tiny_text),
                target_size=size,
                **SETTINGS,
            )
    assert not (tmp_path / "out").exists()
