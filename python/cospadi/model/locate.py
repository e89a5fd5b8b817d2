"""Where a model is: a local folder, a GGUF file or a repository on the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cospadi.errors import InputError

Kind = Literal["folder", "hub", "gguf"]

# How long to wait for the hub's first answer before calling it unreachable. The hub client's own retries take 20 s.
_HUB_TIMEOUT_S = 10.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


@dataclass(frozen=True)
class Location:
    """A resolved source: a local folder, and the GGUF file in it if that is what holds the weights."""

    name: str
    kind: Kind
    folder: Path
    gguf_file: str | None = None

    @property
    def load_arguments(self) -> dict[str, Any]:
        """Arguments common to every ``from_pretrained`` call."""
        arguments: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        if self.gguf_file is not None:
            arguments["gguf_file"] = self.gguf_file
        return arguments


def one_line(error: BaseException, limit: int = 300) -> str:
    """Return the text of an exception on one line, cut after `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def require_hub(repo_id: str, *, repo_type: Literal["model", "dataset"]) -> bool:
    """Ask the hub once, without retries, whether a repository exists.

    Returns
    -------
    bool
        True if the hub answered; False if it cannot be reached or offline mode is on, so only a local cache helps.

    Raises
    ------
    InputError
        The hub answered that there is no such repository, or that it needs a login.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        HfApi().repo_info(repo_id, repo_type=repo_type, timeout=_HUB_TIMEOUT_S)
    except GatedRepoError as error:
        raise InputError(
            f"{repo_type} {repo_id!r} is gated: accept its terms on the hub and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{repo_type} {repo_id!r} is neither a local path nor a repository on the hub "
            "(a private one needs `hf auth login`)"
        ) from error
    except HfHubHTTPError as error:
        raise InputError(f"the hub refused {repo_type} {repo_id!r}: {one_line(error)}") from error
    except Exception:  # connection errors of whatever HTTP client the hub library uses
        return False
    return True


def resolve(
    name_or_path: str | Path, *, gguf_file: str | None, revision: str | None, with_weights: bool
) -> Location:
    """Find the local files of a model, downloading them if it is on the hub.

    Parameters
    ----------
    name_or_path, gguf_file, revision
        See `cospadi.model.source.open_source`.
    with_weights
        Whether the weight files are needed, or only the configuration.

    Raises
    ------
    InputError
        Nothing is there, several GGUF files are, or the hub cannot be reached and the local cache has no copy.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    try:
        is_file, is_dir = path.is_file(), path.is_dir()
    except (OSError, ValueError) as error:  # too long, embedded NUL, no permission
        raise InputError(f"model {text[:80]!r} is not a usable path: {one_line(error)}") from error
    if is_file:
        return _resolve_file(path)
    if is_dir:
        return _resolve_folder(path, gguf_file)
    looks_like_path = isinstance(name_or_path, Path) or text.startswith(("/", ".", "~"))
    if looks_like_path or text.endswith(".gguf") or not _HUB_ID.fullmatch(text):
        raise InputError(f"model {text!r} does not exist: give a folder, a .gguf file or a hub id")
    folder = _download(text, gguf_file, revision, with_weights)
    found = _resolve_folder(folder, gguf_file)
    return Location(text, "gguf" if found.gguf_file else "hub", found.folder, found.gguf_file)


def _resolve_file(path: Path) -> Location:
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise InputError(f"cannot read {path.name}: {error.strerror or one_line(error)}") from error
    if magic != b"GGUF":
        hints = {
            ".safetensors": ": give the folder it lies in",
            ".gguf": ": it is damaged, or cut short before its first four bytes",
        }
        hint = hints.get(path.suffix, "")
        raise InputError(f"{path.name} is a file, but not a GGUF file{hint}")
    return Location(path.stem, "gguf", path.parent, path.name)


def _resolve_folder(folder: Path, gguf_file: str | None) -> Location:
    name = folder.resolve().name
    if gguf_file is not None:
        path = folder / gguf_file
        if not path.is_file():
            raise InputError(f"{name} holds no file {gguf_file!r}")
        return _resolve_file(path)
    if (folder / "config.json").is_file():
        return Location(name, "folder", folder)
    candidates = sorted(folder.glob("*.gguf"))
    if len(candidates) == 1:
        return _resolve_file(candidates[0])
    if candidates:
        listed = ", ".join(p.name for p in candidates[:5])
        raise InputError(
            f"{name} holds {len(candidates)} GGUF files ({listed}): name the one to open"
        )
    raise InputError(f"{name} holds neither config.json nor a .gguf file: it is no model folder")


def _download(
    repo_id: str, gguf_file: str | None, revision: str | None, with_weights: bool
) -> Path:
    """Fetch a hub repository's files into the local cache, or find them there."""
    from huggingface_hub import snapshot_download

    reachable = require_hub(repo_id, repo_type="model")
    patterns = ["*.json", "*.txt", "*.jinja", "LICENSE*", "*.model", "*.tiktoken", "tokenizer*"]
    if gguf_file is not None:
        patterns = [gguf_file]
    elif with_weights:
        patterns += ["*.safetensors"]
    else:
        patterns = ["config.json"]
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=["*/*"] if gguf_file is None else None,
            local_files_only=not reachable,
        )
    except Exception as error:
        if reachable:
            raise InputError(f"downloading {repo_id!r} failed: {one_line(error)}") from error
        raise InputError(
            f"model {repo_id!r} is no local path, and the hub cannot be reached to look it up "
            "(nothing in the local cache either): give a local folder or a .gguf file"
        ) from error
    return Path(folder)
