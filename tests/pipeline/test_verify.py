"""Verification of a compressed directory: against itself, and against the model it was made from."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import cospadi
from cospadi.checkpoint.manifest import MANIFEST_FILE, has_manifest, write_manifest
from cospadi.errors import InputError, NewerFormatError, NotCompressedError, VerificationError
from cospadi.pipeline.compress import compress
from cospadi.pipeline.verify import verify_checkpoint, verify_errors
from tiny_models import make_model

FAST = {"ratio": 0.3, "samples": 8, "sequence_length": 64, "iterations": 1}
REPORT = "cospadi_report.json"
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def made(tiny_model_dir, tiny_text, tmp_path_factory):
    """Compress the tiny Llama: (source, output)."""
    source, out = tiny_model_dir("llama"), tmp_path_factory.mktemp("made") / "out"
    compress(source, out, calibration=str(tiny_text), **FAST)
    return source, out


@pytest.fixture(scope="module")
def made_without_text(tiny_model_dir, tmp_path_factory):
    """The same with a method that never looks at activations."""
    source, out = tiny_model_dir("llama"), tmp_path_factory.mktemp("made") / "svd"
    compress(source, out, method="svd", ratio=0.3)
    return source, out


@pytest.fixture
def copied(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "copy"))


def edit_report(folder: Path, edit) -> None:
    report = json.loads((folder / REPORT).read_text())
    edit(report)
    (folder / REPORT).write_text(json.dumps(report))


def other_model(family: str, folder: Path, tokenizer, seed: int = 1) -> Path:
    make_model(family, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_errors_of_a_method_without_calibration_are_recomputed(made_without_text, tmp_path):
    source, out = made_without_text
    assert verify_errors(out, source) < 1e-6
    with pytest.raises(InputError, match="made without calibration"):
        verify_errors(out, source, calibration="builtin")
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    for kind in ("relative_error", "weight_error"):
        edit_report(copy, lambda report, kind=kind: report["modules"][Q_PROJ].update({kind: 0.01}))
        with pytest.raises(VerificationError, match=rf"{Q_PROJ}: .* is stated as 0\.010000"):
            verify_errors(copy, source)


def test_a_source_without_the_modules_is_another_model(made, tmp_path, tiny_tokenizer):
    other = other_model("gpt2", tmp_path / "gpt2", tiny_tokenizer)
    with pytest.raises(VerificationError, match=rf"{Q_PROJ}: .*no such.*source is another model"):
        verify_errors(made[1], other)


def test_a_source_of_other_sizes_is_another_model(made, tmp_path, tiny_tokenizer):
    import transformers

    config = transformers.LlamaConfig.from_pretrained(made[0], hidden_size=32, head_dim=8)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")
    tiny_tokenizer.save_pretrained(tmp_path / "narrow")
    with pytest.raises(
        VerificationError, match=rf"{Q_PROJ}: linear 64 x 64 in .*, linear 32 x 32 in narrow"
    ):
        verify_errors(made[1], tmp_path / "narrow")


def test_a_source_without_the_last_blocks_is_another_model(made, tmp_path, tiny_tokenizer):
    import transformers

    config = transformers.LlamaConfig.from_pretrained(made[0], num_hidden_layers=1)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "short")
    tiny_tokenizer.save_pretrained(tmp_path / "short")
    with pytest.raises(VerificationError, match=r"^model\.layers\.1\.self_attn\.q_proj: compress"):
        verify_errors(made[1], tmp_path / "short")


def test_other_weights_of_equal_shape_differ_in_the_fingerprint(
    made, copied, tmp_path, tiny_tokenizer
):
    other = other_model("llama", tmp_path / "other", tiny_tokenizer)
    with pytest.raises(VerificationError, match=r"its fingerprint is sha256:.*another model"):
        verify_errors(made[1], other)
    # and where the report states no fingerprint, the errors tell
    edit_report(copied, lambda report: report.pop("source"))
    assert verify_errors(copied, made[0]) < 1e-3
    with pytest.raises(VerificationError, match="weight_error is stated as"):
        verify_errors(copied, other)


def test_one_changed_weight_of_an_unnamed_source_is_found(made, copied, tmp_path):
    """The last module is compared as well as the first."""
    source = Path(shutil.copytree(made[0], tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    tensors[f"{name}.weight"] *= 1.1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    edit_report(copied, lambda report: report.pop("source"))
    with pytest.raises(VerificationError, match=f"^{name}: weight_error"):
        verify_errors(copied, source)


@pytest.mark.parametrize("kind", ["relative_error", "weight_error"])
@pytest.mark.parametrize("value", [None, "0.5", True, float("nan"), "absent"])
def test_every_module_needs_a_stated_error(made, copied, kind, value):
    def edit(report):
        report["modules"][Q_PROJ][kind] = value
        if value == "absent":
            del report["modules"][Q_PROJ]

    edit_report(copied, edit)
    with pytest.raises(VerificationError, match=REPORT):
        verify_errors(copied, made[0])


@pytest.mark.parametrize("text", ["[1", "{}", "[]", '{"recipe": {"ratio": 7}, "modules": {}}'])
def test_damaged_report(made, copied, text):
    (copied / REPORT).write_text(text)
    with pytest.raises(VerificationError, match=REPORT):
        verify_errors(copied, made[0])


def test_without_a_report_there_is_nothing_to_recompute(made, copied):
    (copied / REPORT).unlink()
    with pytest.raises(InputError, match=f"{REPORT}: missing"):
        verify_errors(copied, made[0])


def test_a_calibration_path_that_leads_nowhere_from_here(made, copied, tiny_text):
    edit_report(copied, lambda report: report["recipe"].update(calibration="data/text.txt"))
    with pytest.raises(InputError, match=r"data/text\.txt.* give --calibration PATH"):
        verify_errors(copied, made[0])
    assert verify_errors(copied, made[0], calibration=str(tiny_text)) < 1e-3
    with pytest.raises(InputError, match=r"text 'gone\.txt' does not exist$"):
        verify_errors(copied, made[0], calibration="gone.txt")
    with pytest.raises(VerificationError, match=r"calibration ids hash to .* another text"):
        verify_errors(copied, made[0], calibration="builtin")


def test_what_save_pretrained_writes_is_checked_but_for_hashes(made, tmp_path):
    model, _ = cospadi.load(made[1])
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    assert not has_manifest(saved)
    assert verify_checkpoint(saved) == 14
    tensors = load_file(saved / "model.safetensors")
    tensors[f"{Q_PROJ}.mask"][0, 0] ^= 1
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=f"{Q_PROJ}.mask"):
        verify_checkpoint(saved)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def edit_config(path: Path, value: object) -> None:
    config = json.loads(path.read_text())
    config["quantization_config"] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", flip),
        ("model.safetensors", Path.unlink),
        ("config.json", cut),
        ("config.json", Path.unlink),
        ("config.json", lambda path: edit_config(path, 7)),
        ("config.json", lambda path: edit_config(path, None)),
        ("config.json", lambda path: edit_config(path, {"quant_method": "cospadj"})),
        ("config.json", lambda path: edit_config(path, {"quant_method": "cospadi"})),
        ("tokenizer.json", Path.unlink),
        ("recipe.yaml", flip),
        (MANIFEST_FILE, cut),
        (MANIFEST_FILE, lambda path: path.write_text("{}")),
    ],
)
def test_damage_is_no_input_error(copied, file, damage):
    damage(copied / file)
    with pytest.raises(VerificationError, match=file):
        verify_checkpoint(copied)


@pytest.mark.parametrize("value", [7, [], {}, {"quant_method": "cospadi", "format_version": 0}])
def test_damaged_config_without_a_manifest_is_damage_too(copied, value):
    (copied / MANIFEST_FILE).unlink()
    edit_config(copied / "config.json", value)
    with pytest.raises(VerificationError, match=r"config\.json"):
        verify_checkpoint(copied)


def test_several_damaged_files_are_counted(copied):
    for name in ("recipe.yaml", "README.md", "tokenizer.json"):
        flip(copied / name)
    with pytest.raises(VerificationError, match=r"README\.md: .* \(and 2 more files\)$"):
        verify_checkpoint(copied)


def test_what_load_refuses_is_refused(copied):
    """No hash covers a file that came later."""
    (copied / "adapter_config.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"adapter_config\.json would load another"):
        verify_checkpoint(copied)


def test_what_is_no_compressed_directory(tiny_model_dir, tmp_path):
    with pytest.raises(NotCompressedError, match="no such folder"):
        verify_checkpoint(tmp_path / "nothing")
    with pytest.raises(NotCompressedError, match=r"config\.json is missing"):
        verify_checkpoint(tmp_path)
    with pytest.raises(NotCompressedError, match="not compressed"):
        verify_checkpoint(tiny_model_dir("llama"))
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(NotCompressedError, match="gptq"):
        verify_checkpoint(tmp_path)


def test_non_finite_coefficients_are_found_behind_right_hashes(copied):
    weights = copied / "model.safetensors"
    tensors = load_file(weights)
    tensors[f"{Q_PROJ}.coeffs"][0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    write_manifest(copied)
    with pytest.raises(VerificationError, match=f"{Q_PROJ}.coeffs"):
        verify_checkpoint(copied)


def test_a_newer_version_is_not_damage(copied):
    """Only with the hashes of a newer writer: an edited version number alone is damage."""
    config = json.loads((copied / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match="newer version"):
        verify_checkpoint(copied)
    write_manifest(copied)
    with pytest.raises(NewerFormatError, match="format_version 99: made by a newer version"):
        verify_checkpoint(copied)
    assert NewerFormatError.exit_code == 2


def edit_weights(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    (folder / MANIFEST_FILE).unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_other_tensors_are_finite(name, value, copied):
    edit_weights(copied, lambda t: t[name].view(-1)[3].fill_(value))
    with pytest.raises(VerificationError, match=f"{name}: holds a value that is not finite"):
        verify_checkpoint(copied)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_other_tensors_are_those_of_the_source(name, made, copied):
    source = made[0]
    edit_weights(copied, lambda t: t[name].mul_(-3))
    assert verify_checkpoint(copied) > 0
    with pytest.raises(VerificationError, match=f"{name}: not compressed, and yet another"):
        verify_errors(copied, source)


def test_a_perplexity_is_measured_again(made, copied, tiny_text, tmp_path):
    stated = tmp_path / "stated.json"
    command = [sys.executable, "-m", "cospadi"]
    measured = ["eval", copied, "--text", tiny_text, "--context", "32", "--windows", "4"]
    subprocess.run([*command, *measured, "--json", stated], check=True, capture_output=True)

    def run(*given):
        return subprocess.run(
            [*command, "verify", copied, "--perplexity", stated, *given],
            capture_output=True,
            text=True,
            check=False,
        )

    done = run()
    assert done.returncode == 0 and "the stated perplexity holds" in done.stdout
    moved = tmp_path / "moved.txt"
    moved.write_text(tiny_text.read_text())
    assert run("--text", moved).returncode == 0
    moved.write_text(tiny_text.read_text()[100:])
    done = run("--text", moved)
    assert done.returncode == 4 and "another text" in done.stderr
    data = json.loads(stated.read_text())
    for change, code, words in (
        ({"perplexity": data["perplexity"] * 1.01}, 4, "perplexity is stated as"),
        ({"perplexity": None}, 2, "perplexity: expected what eval"),
        ({"dtype": "int3"}, 2, "not of eval"),
    ):
        stated.write_text(json.dumps(data | change))
        done = run()
        assert done.returncode == code and words in done.stderr
