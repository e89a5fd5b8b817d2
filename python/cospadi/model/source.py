"""Opening a dense model: a Hugging Face folder, a hub id or a GGUF file.

Everything that can be wrong with a checkpoint is turned into a one-line `InputError` here, so that the code behind
it may rely on a complete, finite, dense fp32 causal language model with a working tokenizer. transformers fills what
a checkpoint lacks with random numbers and only warns; compressing such a model would look like success, therefore
missing tensors are errors.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cospadi.errors import InputError, install_command
from cospadi.model.discover import TargetLinear, weight_of
from cospadi.model.files import (
    WeightCount,
    blamed_key,
    check_decoder,
    check_raw_config,
    check_tokenizer_files,
    check_weight_files,
    read_json,
    vocabulary_file,
)
from cospadi.model.gguf_once import gguf_parsed_once
from cospadi.model.locate import Kind, Location, one_line, resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# No model has more blocks than this; a damaged config must not make us build modules for hours.
_MAX_LAYERS = 4096
# A config may describe this many times the stored elements and be loaded: missing tensors are then named one by one.
_MOST_OVERSIZE = 2
_PROBE_TEXT = "The quick brown fox"


@dataclass(eq=False)
class SourceModel:
    """A dense model ready to be calibrated and compressed.

    Attributes
    ----------
    model
        Causal language model, every parameter fp32 and finite, on the CPU, in eval mode, without gradients.
    tokenizer
        Its tokenizer.
    config
        ``model.config``; carries no quantization_config, ``architectures`` is always set.
    name
        What the caller passed for a hub id, otherwise the last part of the path.
    kind
        Where it came from.
    fingerprint
        ``sha256:<hex>`` over the configuration and the weight files (name, size and content of each).
    path
        Local folder, or the GGUF file.
    notes
        One line each about what is odd but no error: tensors of the checkpoint that the model has no place for.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    name: str
    kind: Kind
    fingerprint: str
    path: Path
    notes: tuple[str, ...] = ()

    def weight(self, target: TargetLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of a target, see `cospadi.model.discover.weight_of`."""
        return weight_of(self.model, target)


@dataclass(eq=False)
class SourceShapes:
    """The structure of a model: every parameter lies on the meta device and holds no data."""

    model: PreTrainedModel
    config: PretrainedConfig
    name: str
    kind: Kind


def open_source(
    name_or_path: str | Path, *, gguf_file: str | None = None, revision: str | None = None
) -> SourceModel:
    """Open a dense causal language model with its tokenizer, in fp32.

    Parameters
    ----------
    name_or_path
        Folder in Hugging Face layout, folder with exactly one ``.gguf`` file and no ``config.json``, path of a
        ``.gguf`` file, or a hub id (``owner/name``; the network or a cached copy is needed).
    gguf_file
        Name of the GGUF file inside the folder or hub repository, where there are several.
    revision
        Branch, tag or commit of a hub id.

    Returns
    -------
    SourceModel
        GGUF weights are dequantised: what remains is an ordinary dense model.

    Raises
    ------
    InputError
        The path does not exist, the hub cannot be reached, the configuration, the weights or the tokenizer are
        missing or damaged, the model is no causal language model or is already compressed, or a weight holds NaN
        or infinity (the message names the tensor).

    Notes
    -----
    Peak memory is the fp32 model plus one checkpoint tensor. Never runs code from the checkpoint.
    """
    location = resolve(name_or_path, gguf_file=gguf_file, revision=revision, with_weights=True)
    stored = None
    if location.gguf_file is None:
        stored = check_weight_files(location.folder)
        check_tokenizer_files(location.folder)
    with gguf_parsed_once() if location.gguf_file else nullcontext():
        config = load_config(location, stored)
        if stored is not None:
            check_size(config, stored, location.name)
        tokenizer = load_tokenizer(location)
        model, notes = _load_model(location, config)
    _check_finite(model, location.name)
    _check_runs(model, tokenizer, location.name)
    path = location.folder / location.gguf_file if location.gguf_file else location.folder
    return SourceModel(
        model=model,
        tokenizer=tokenizer,
        config=model.config,
        name=location.name,
        kind=location.kind,
        fingerprint=location_fingerprint(location),
        path=path,
        notes=notes,
    )


def source_shapes(
    name_or_path: str | Path, *, gguf_file: str | None = None, revision: str | None = None
) -> SourceShapes:
    """Build the model's structure on the meta device: shapes without reading any weight.

    Parameters and errors are those of `open_source`, except that weights and tokenizer are not looked at.
    """
    location = resolve(name_or_path, gguf_file=gguf_file, revision=revision, with_weights=False)
    config = load_config(location, None)
    model = _meta_model(config, location.name)
    return SourceShapes(model.eval(), config, location.name, location.kind)


def source_fingerprint(
    name_or_path: str | Path, *, gguf_file: str | None = None, revision: str | None = None
) -> str:
    """Return the `SourceModel.fingerprint` of a model without loading it.

    Parameters and errors are those of `open_source`, as far as finding the files goes.
    """
    return location_fingerprint(
        resolve(name_or_path, gguf_file=gguf_file, revision=revision, with_weights=True)
    )


def load_config(location: Location, stored: WeightCount | None) -> PretrainedConfig:
    """Configuration of a causal language model; errors as for `open_source`."""
    from transformers import AutoConfig

    name = location.name
    raw: dict[str, Any] = {}
    if location.gguf_file is not None:
        for package in ("gguf", "accelerate"):
            if find_spec(package) is None:
                raise InputError(
                    f"reading GGUF needs the package {package}: {install_command('gguf')}"
                )
    else:
        raw = read_json(location.folder / "config.json")
        check_raw_config(raw, name)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(location.folder, **location.load_arguments)
            text_config = config.get_text_config()
            layers = getattr(text_config, "num_hidden_layers", None)
            encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    except Exception as error:
        if location.gguf_file is not None:
            _check_whole_gguf(location.folder / location.gguf_file)
        source = location.folder / (location.gguf_file or "config.json")
        raise InputError(
            f"cannot read the configuration in {source}: {one_line(error)}{blamed_key(raw, str(error))}"
        ) from error
    if encoder_decoder:
        raise InputError(
            f"{name} is an encoder-decoder model ({config.model_type}): a causal language model is needed"
        )
    check_decoder(config, name)
    most = _MAX_LAYERS if stored is None else min(_MAX_LAYERS, stored.n_tensors)
    if layers is not None and not (isinstance(layers, int) and 1 <= layers <= most):
        raise InputError(
            f"{name}: config.json says {layers!r} hidden layers, expected at least 1, and no more than the "
            f"checkpoint has tensors ({most})"
        )
    return config


def _check_whole_gguf(path: Path) -> None:
    """Tell a damaged GGUF file from one whose content transformers does not know."""
    from gguf import GGUFReader

    try:
        GGUFReader(path)
    except Exception as error:
        raise InputError(
            f"{path}: truncated or damaged GGUF file ({type(error).__name__}: {one_line(error)}); download it again"
        ) from error


def _meta_model(config: PretrainedConfig, name: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise InputError(
            f"{name}: cannot build a causal language model from its config: {one_line(error)}"
            f"{blamed_key(config.to_dict(), str(error))}"
        ) from error


def check_size(config: PretrainedConfig, stored: WeightCount, name: str) -> None:
    """Refuse a config that describes much more than there is.

    transformers would allocate and initialise all of it before it reports what is missing.
    """
    described = sum(p.numel() for p in _meta_model(config, name).parameters())
    if described > _MOST_OVERSIZE * stored.n_elements:
        raise InputError(
            f"{name}: config.json describes {described} parameters, the weight files hold {stored.n_elements}"
        )


# --- loading ---------------------------------------------------------------------------------------------------------


def load_tokenizer(location: Location) -> PreTrainedTokenizerBase:
    """Tokenizer of a model, which must know some tokens."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(location.folder, **location.load_arguments)
        probe = tokenizer(_PROBE_TEXT, add_special_tokens=False)["input_ids"]
    except Exception as error:
        folder = location.folder
        file = folder / location.gguf_file if location.gguf_file else vocabulary_file(folder)
        raise InputError(
            f"{location.name}: cannot load the tokenizer from {file or folder} "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error
    if not probe:
        raise InputError(f"{location.name}: the tokenizer is empty (it turns text into no tokens)")
    return tokenizer


def _gguf_arguments() -> dict[str, Any]:
    """Return what makes transformers multiply GGUF weights out; before ``GgufConfig`` it always did."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _load_model(
    location: Location, config: PretrainedConfig
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Return the model, and a note on stored tensors that it does not use."""
    from transformers import AutoModelForCausalLM

    name = location.name
    arguments = dict(location.load_arguments)
    if location.gguf_file is not None:
        arguments |= _gguf_arguments()
    try:
        # the GGUF reader draws its progress bar on stderr, whatever transformers' settings say
        with quiet_transformers(), redirect_stderr(io.StringIO()):
            model, info = AutoModelForCausalLM.from_pretrained(
                location.folder,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # an error below, which can name the tensor
                **arguments,
            )
    except Exception as error:
        raise InputError(f"{name}: cannot load the model: {one_line(error)}") from error
    _check_loading(info, type(model).__name__, name)
    _forget_quantizer(model)
    model.config.architectures = [type(model).__name__]
    return model.eval().requires_grad_(False), _surplus(info, type(model).__name__, name)


def _surplus(info: dict[str, Any], architecture: str, name: str) -> tuple[str, ...]:
    surplus = sorted(info.get("unexpected_keys") or ())
    if not surplus:
        return ()
    count = f"{len(surplus)} tensor{'s' if len(surplus) > 1 else ''}"
    return (
        f"{name}: {count} of the checkpoint, first {surplus[0]}, not used: "
        f"{architecture} as config.json describes it has no place for them",
    )


def _check_loading(info: dict[str, Any], architecture: str, name: str) -> None:
    """Turn transformers' report into an error: whatever did not load is random now."""
    mismatched = sorted(info.get("mismatched_keys") or ())
    if mismatched:
        tensor, stored, wanted = mismatched[0]
        raise InputError(
            f"{name}: the tensor {tensor} is {list(stored)} in the checkpoint, config.json makes it {list(wanted)}"
        )
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{name}: the checkpoint lacks the tensor {missing[0]}{more} that {architecture} needs"
        )
    messages = info.get("error_msgs") or ()
    if messages:
        raise InputError(
            f"{name}: a tensor cannot be loaded: {' '.join(str(messages[0]).split()):.300}"
        )


def _forget_quantizer(model: PreTrainedModel) -> None:
    """Remove what GGUF loading leaves behind; otherwise the dense model cannot be saved."""
    for owner, attribute in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
        (model.config, "quantization_config"),
        (model.config, "_pre_quantization_dtype"),
    ):
        if attribute in vars(owner):
            delattr(owner, attribute)


def _check_finite(model: PreTrainedModel, name: str) -> None:
    for tensor_name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise InputError(f"{name}: the tensor {tensor_name} was not loaded")
        if parameter.numel() == 0:
            raise InputError(
                f"{name}: the tensor {tensor_name} is empty (shape {tuple(parameter.shape)})"
            )
        # aminmax hands on NaN, needs no temporary and one pass
        low, high = torch.aminmax(parameter)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            bad = int((~torch.isfinite(parameter)).sum())
            raise InputError(
                f"{name}: the tensor {tensor_name} holds {bad} non-finite values (NaN or infinity) "
                f"of {parameter.numel()}: repair or download the checkpoint again"
            )


def _check_runs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Run a few tokens: a configuration can fit every tensor and still describe a model that cannot work."""
    ids = torch.tensor([tokenizer(_PROBE_TEXT, add_special_tokens=False)["input_ids"][:4]])
    rows = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= rows:
        raise InputError(
            f"{name}: the tokenizer does not belong to the model: it gives the token {int(ids.max())}, "
            f"the vocabulary has {rows}"
        )
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    except Exception as error:
        raise InputError(
            f"{name}: the model cannot run with its config.json: {one_line(error)}"
        ) from error
    if not torch.isfinite(logits).all():
        raise InputError(
            f"{name}: the model gives non-finite logits, first seen in the output of "
            f"{_first_non_finite(model, ids)}: its weights overflow, or config.json does not fit them"
        )


def _first_non_finite(model: PreTrainedModel, ids: torch.Tensor) -> str:
    """Return the module that is the first to give a value that is not finite."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, arguments: object, output: object) -> None:
            for value in output if isinstance(output, (tuple, list)) else (output,):
                if isinstance(value, torch.Tensor) and not torch.isfinite(value).all():
                    found.append(name)

        return hook

    hooks = [
        module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name
    ]
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
    return found[0] if found else type(model).__name__


def location_fingerprint(location: Location) -> str:
    """Hash the files that decide the weights."""
    if location.gguf_file is not None:
        files = [location.folder / location.gguf_file]
    else:
        weights = sorted(location.folder.glob("*.safetensors")) or sorted(
            location.folder.glob("pytorch_model*.bin")
        )
        files = [location.folder / "config.json", *weights]
    digest = hashlib.sha256()
    for path in files:
        content = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                content.update(block)
        digest.update(f"{path.name} {path.stat().st_size} {content.hexdigest()}\n".encode())
    return f"sha256:{digest.hexdigest()}"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and advice while loading; problems reach the user as errors instead."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    had_progress_bar = logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_progress_bar:
            logging.enable_progress_bar()
