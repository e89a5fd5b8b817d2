"""What the files of a model folder say before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cospadi.checkpoint.safetensors_file import read_header
from cospadi.checkpoint.strict_json import MAX_JSON_BYTES
from cospadi.errors import InputError
from cospadi.model.locate import one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
# Heads other than next-token prediction. A checkpoint of one of these can load as a causal model without a missing
# tensor (tied embeddings), but its weights were not trained for it.
_OTHER_HEADS = (
    "MaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForPreTraining",
)
_MAX_DIMENSION = 2**31 - 1
# What only makes sense as a number of something, in Llama's and in GPT-2's words; null leaves it to the default.
_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "vocab_size",
    "n_embd",
    "n_head",
    "n_layer",
    "n_positions",
)


@dataclass(frozen=True)
class WeightCount:
    """Number of tensors in a folder's weight files, and of elements in all of them."""

    n_tensors: int
    n_elements: int


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or raise an `InputError` that names the file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: more than {MAX_JSON_BYTES} bytes of JSON")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: it is not UTF-8 text") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def check_weight_files(folder: Path) -> WeightCount | None:
    """Check the headers of a folder's safetensors files, without reading weights.

    Returns
    -------
    WeightCount or None
        None when the weights are in another format, which transformers then has to judge.

    Raises
    ------
    InputError
        There are no weights, a shard is missing, or a file is truncated or damaged.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    elif index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index} has no weight_map")
        shards = sorted({str(value) for value in weight_map.values()})
    elif any(folder.glob("pytorch_model*.bin")):
        return None
    else:
        raise InputError(f"{folder} holds no weights: no model.safetensors in it")
    n_tensors = n_elements = 0
    for shard in shards:
        if Path(shard).name != shard:
            raise InputError(
                f"{index} names the shard {shard!r}: shards must lie in the model's own folder"
            )
        if not (folder / shard).is_file():
            raise InputError(f"{index} names the shard {shard!r}, which is missing")
        header = read_header(folder / shard)
        for name, info in header.items():
            if (
                name.endswith(".weight")
                and len(info.shape) == 2
                and not info.dtype.is_floating_point
            ):
                raise InputError(
                    f"{folder / shard}: {name} is {info.dtype}, expected floating point: an already quantised "
                    "checkpoint? start from the dense one"
                )
        n_tensors += len(header)
        n_elements += sum(prod(info.shape) for info in header.values())
    return WeightCount(n_tensors, n_elements)


def check_tokenizer_files(folder: Path) -> None:
    """Check that a folder holds the vocabulary of some tokenizer.

    Raises
    ------
    InputError
        It does not.
    """
    # transformers builds an empty tokenizer where these are missing, and says nothing
    if vocabulary_file(folder) is None:
        raise InputError(
            f"{folder} has no tokenizer: expected tokenizer.json, tokenizer.model or vocab files beside config.json; "
            "copy them there from where the model came from"
        )


def vocabulary_file(folder: Path) -> Path | None:
    """Return the file with the vocabulary of the folder's tokenizer, None if there is none."""
    candidates = [*(folder / name for name in _TOKENIZER_FILES), *sorted(folder.glob("*.tiktoken"))]
    return next((path for path in candidates if path.is_file()), None)


def check_decoder(config: PretrainedConfig, name: str) -> None:
    """Refuse the configuration of an encoder, for which transformers builds a causal model all the same.

    Raises
    ------
    InputError
        The model type has a masked-language model, and nothing says that this one looks backwards only.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = config.model_type
    looks_back = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not looks_back:
        raise InputError(f"{name} is an encoder ({kind}), no causal language model")


def check_raw_config(raw: dict[str, Any], name: str) -> None:
    """Refuse what only the file shows: other heads, earlier compression, sizes that no tensor can have."""
    quantization = raw.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method == "cospadi":
            raise InputError(
                f"{name} is already compressed with cospadi: start from the dense checkpoint"
            )
        raise InputError(
            f"{name} is already quantised ({method or 'unknown method'}): start from the dense checkpoint"
        )
    architectures = raw.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise InputError(
            f"{name}: 'architectures' in config.json must be a list of names, got {architectures!r:.80}"
        )
    if architectures and all(a.endswith(_OTHER_HEADS) for a in architectures):
        raise InputError(f"{name} is a {architectures[0]}, no causal language model")
    for key, value in _walk(raw):
        if isinstance(value, int) and abs(value) > _MAX_DIMENSION:
            raise InputError(f"{name}: {key} = {value!s:.40} in config.json is out of range")
        if key in _COUNTS and value is not None and not (type(value) is int and value >= 1):
            raise InputError(
                f"{name}: {key} = {value!r:.40} in config.json, expected an integer of at least 1"
            )


def blamed_key(raw: dict[str, Any], message: str) -> str:
    """Name the setting that an outside error message quotes, as " (key = value in config.json)", or nothing.

    transformers says what it did not understand, not where it read it.
    """
    for key, value in _walk(raw):
        quoted = repr(value) in message or (len(str(key)) > 4 and str(key) in message)
        if isinstance(value, str) and len(value) > 2 and quoted:
            return f" ({key} = {value!r:.40} in config.json)"
    return ""


def _walk(raw: dict[str, Any], depth: int = 0) -> Iterator[tuple[str, object]]:
    for key, value in raw.items():
        yield key, value
        if isinstance(value, dict) and depth < 8:
            yield from _walk(value, depth + 1)
