"""The work directory: what is committed comes back bit for bit, what is damaged does not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from cospadi.errors import InputError
from cospadi.factor.sparse_factor import SparseFactor
from cospadi.pipeline.workdir import WorkDir

NAME = "model.layers.0.mlp.up_proj"


def factor() -> SparseFactor:
    generator = torch.Generator().manual_seed(0)
    indices = torch.tensor([[0, 3], [1, 2], [0, 1]], dtype=torch.int32)
    return SparseFactor.from_indices(
        torch.randn(6, 4, generator=generator).bfloat16(),
        indices,
        torch.randn(3, 2, generator=generator).bfloat16(),
        torch.randn(3, generator=generator).bfloat16(),
    )


def test_stored_factor_comes_back_bit_for_bit(tmp_path):
    settings = {"ratio": 0.2, "targets": ("a",)}
    with WorkDir(tmp_path / "out.work", settings) as work:
        assert work.load(NAME) is None
        work.store(NAME, factor(), {"relative_error": 0.25})
    with WorkDir(tmp_path / "out.work", settings) as again:
        loaded = again.load(NAME)
    assert loaded is not None
    found, report = loaded
    assert report == {"relative_error": 0.25}
    for part in ("dictionary", "mask", "coeffs", "bias"):
        assert torch.equal(getattr(found, part), getattr(factor(), part))


def test_other_settings_are_refused_and_named(tmp_path):
    with WorkDir(tmp_path / "w", {"weights": "a", "ratio": 0.2}) as work:
        work.store(NAME, factor(), {})
    # the setting explains more than the hash
    with pytest.raises(InputError, match=r"ratio: 0\.2 there, 0\.3 now"):
        WorkDir(tmp_path / "w", {"weights": "b", "ratio": 0.3})


def test_a_run_without_results_is_taken_over(tmp_path):
    with WorkDir(tmp_path / "w", {"ratio": 0.2}):
        pass
    with WorkDir(tmp_path / "w", {"ratio": 0.3}) as work:
        assert work.is_empty


def test_a_directory_in_use_is_refused(tmp_path):
    with (
        WorkDir(tmp_path / "w", {}),
        pytest.raises(InputError, match="another process"),
    ):
        WorkDir(tmp_path / "w", {})


@pytest.mark.parametrize("damage", ["truncate", "flip", "no record", "record cut", "empty"])
def test_damaged_results_are_fitted_again(tmp_path, damage):
    with WorkDir(tmp_path / "w", {}) as work:
        work.store(NAME, factor(), {})
    data, record = (
        tmp_path / "w/modules" / f"{NAME}.safetensors",
        tmp_path / "w/modules" / f"{NAME}.json",
    )
    if damage == "truncate":
        data.write_bytes(data.read_bytes()[:-3])
    elif damage == "flip":
        content = bytearray(data.read_bytes())
        content[-1] ^= 1
        data.write_bytes(content)
    elif damage == "no record":
        record.unlink()
    elif damage == "record cut":
        record.write_text(record.read_text()[:10])
    else:
        data.write_bytes(b"")
    assert work.load(NAME) is None


def test_foreign_directory_is_left_alone(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not a work directory"):
        WorkDir(tmp_path / "w", {})
    assert (tmp_path / "w" / "thesis.txt").read_text() == "precious"


def test_several_different_settings_are_all_named(tmp_path):
    with WorkDir(tmp_path / "w", {"weights": "a", "ratio": 0.2, "samples": 4, "seed": 42}) as work:
        work.store(NAME, factor(), {})
    with pytest.raises(InputError, match=r"ratio: 0\.2 there, 0\.3 now, samples: 4 there, 5 now\)"):
        WorkDir(tmp_path / "w", {"weights": "b", "ratio": 0.3, "samples": 5, "seed": 42})


def test_a_result_under_another_name_is_fitted_again(tmp_path):
    other = "model.layers.1.mlp.up_proj"
    with WorkDir(tmp_path / "w", {}) as work:
        work.store(NAME, factor(), {"relative_error": 0.25})
        work.store_record("curves", NAME, {"x": 1})
        for end in ("json", "safetensors"):
            folder = tmp_path / "w/modules"
            shutil.copy(folder / f"{NAME}.{end}", folder / f"{other}.{end}")
        shutil.copy(tmp_path / f"w/curves/{NAME}.json", tmp_path / f"w/curves/{other}.json")
        assert work.has(NAME) and not work.has(other)
        assert work.load_record("curves", NAME) == {"x": 1}
        assert work.load_record("curves", other) is None


@pytest.mark.parametrize("change", [{"report": {"relative_error": 0.2}}, {"spec": {}}, {"x": 1}])
def test_a_changed_record_is_fitted_again(change, tmp_path):
    with WorkDir(tmp_path / "w", {}) as work:
        work.store(NAME, factor(), {"relative_error": 0.25})
        path = tmp_path / "w/modules" / f"{NAME}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        assert not work.has(NAME)


def test_a_link_in_place_of_the_results_is_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    work = tmp_path / "out.work"
    WorkDir(work, {"a": 1}).close()
    (work / "modules").rmdir()
    (work / "modules").symlink_to(elsewhere)
    with pytest.raises(InputError, match="modules: a link"):
        WorkDir(work, {"a": 1})
    assert not list(elsewhere.iterdir())
