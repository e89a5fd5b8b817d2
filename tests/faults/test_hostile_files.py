"""Files from strangers other than checkpoints: recipes, work directories, configurations."""

from __future__ import annotations

import json

import pytest

from cospadi.errors import InputError
from cospadi.model.files import read_json
from cospadi.pipeline.open_model import is_compressed
from cospadi.pipeline.recipe_file import MAX_RECIPE_BYTES, read_recipe_file
from cospadi.pipeline.workdir import WorkDir, recorded_threads

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, r"line 2: not valid YAML: alias \*a: not used"),
        ("a: &a\n  b: *a\n", "alias"),
        ("ratio: " + "[" * 20_000, "nested too deeply|not valid YAML"),
        ("ratio: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("ratio: !!python/name:os.system\n", "not valid YAML"),
        ("# " + "x" * MAX_RECIPE_BYTES, "more than"),
    ],
)
def test_hostile_recipes_are_one_line(text, message, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_recipe_file(file)
    assert "\n" not in str(caught.value)


DEEP = "[" * 200_000


@pytest.mark.parametrize("content", [DEEP, '{"a": ' + DEEP, '{"settings": {"threads": 1e999}}', ""])
def test_hostile_records_of_a_work_directory(content, tmp_path):
    work = WorkDir(tmp_path / "w", {"ratio": 0.2})
    for kind in ("modules", "curves"):
        (tmp_path / "w" / kind).mkdir(exist_ok=True)
        (tmp_path / "w" / kind / "a.json").write_text(content)
    assert work.load("a") is None and work.load_record("curves", "a") is None
    assert work.entry("a") is None and not work.has("a")
    work.close()
    (tmp_path / "w/run.json").write_text(content)
    assert recorded_threads(tmp_path / "w") is None
    with pytest.raises(InputError, match="damaged"):
        WorkDir(tmp_path / "w", {"ratio": 0.2})


def test_a_record_with_sizes_of_another_world_is_missing(tmp_path):
    with WorkDir(tmp_path / "w", {}) as work:
        record = {"fingerprint": work.fingerprint, "sha256": "", "report": {}, "spec": {}}
        for spec in ({}, {"d_in": 2**62}, {"d_in": -1, "x": 1}, []):
            (tmp_path / "w/modules/a.json").write_text(json.dumps({**record, "spec": spec}))
            (tmp_path / "w/modules/a.safetensors").write_bytes(b"\xff" * 64)
            assert work.load("a") is None


def test_deep_configurations_are_refused_and_do_not_end_the_process(tmp_path):
    (tmp_path / "config.json").write_text(DEEP)
    assert not is_compressed(tmp_path)
    with pytest.raises(InputError, match="not valid JSON"):
        read_json(tmp_path / "config.json")
