"""The data of one compression, checked: what its page and its model card read.

`read_compression` takes the plain dict of ``cospadi_report.json``. A checkpoint may come from strangers or from an
older version, so every measurement may be missing; what is there must have the right type and be finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cospadi.report import plain

PLAIN_WHITENING = (("cholesky",), ("identity: no calibration",))
"""Whitening that needed no step beyond the first."""

LEAST_TOKENS = 4.0
"""Calibration tokens per input dimension below which runs and pages warn. With so many of them the eigenvalues of a
Gram of independent inputs lie within 1/4 and 9/4 of the true ones (Marchenko and Pastur); below 1 some are zero."""


BUILTIN_TEXT = "the built-in text is for trying out, not for shipping"
"""Remark where nothing else calibrated: it is the reference of one programming language."""


@dataclass(frozen=True)
class Linear:
    """What one compressed linear got.

    Attributes
    ----------
    leader : str or None
        Name of the linear whose dictionary it uses; None for its own.
    relative_error, weight_error : float or None
        Of outputs on the calibration text, and of the weight.
    seconds : float or None
        Of the fit.
    whitening : tuple of str
        Steps of the whitening ladder.
    n_unused : int or None
        Atoms that no output used after the last alternation.
    loss, even_loss : float or None
        Predicted cost in nats per token, with its share of the budget and with an even one.
    n_tokens, n_dead_inputs : int or None
        Calibration tokens that reached it, and inputs that they left at zero.
    """

    name: str
    d_in: int | None
    d_out: int | None
    n_identity: int | None
    n_atoms: int | None
    sparsity: int | None
    coeffs_dtype: str | None
    dictionary_dtype: str | None
    leader: str | None
    dense_bytes: int | None
    stored_bytes: int | None
    relative_error: float | None
    weight_error: float | None
    seconds: float | None
    whitening: tuple[str, ...]
    n_unused: int | None
    loss: float | None
    even_loss: float | None
    n_tokens: int | None
    n_dead_inputs: int | None

    @property
    def tokens_per_input(self) -> float | None:
        """Calibration tokens per input dimension."""
        return self.n_tokens / self.d_in if self.n_tokens is not None and self.d_in else None

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per weight of the dense matrix."""
        if self.stored_bytes is None or not self.d_in or not self.d_out:
            return None
        return 8 * self.stored_bytes / (self.d_in * self.d_out)

    @property
    def kept(self) -> float | None:
        """Stored bytes as a share of the dense ones."""
        if self.stored_bytes is None or not self.dense_bytes:
            return None
        return self.stored_bytes / self.dense_bytes


@dataclass(frozen=True)
class Dense:
    """A linear that stayed dense, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Block:
    """What tuning one decoder block gained: errors of its output before and after, and whether the result was taken."""

    block: int | None
    before: float | None
    after: float | None
    is_kept: bool
    seconds: float | None


@dataclass(frozen=True)
class Compression:
    """One compression.

    Attributes
    ----------
    source, calibration, versions, recipe : dict
        Facts for the reader, as they came.
    ratio, model_ratio : dict
        Removed shares by convention (`cospadi.report.conventions.CONVENTIONS`), of the compressed linears and of the
        whole model.
    linear_bytes, model_bytes : dict
        ``dense`` and ``stored`` bytes.
    stages : dict
        Seconds by stage, in order.
    n_resumed : int
        Linears that an earlier process finished.
    failed : tuple of str
        Linears that should have been compressed and stayed dense.
    predicted_loss, predicted_uniform : float or None
        Where the budget was divided by loss: nats per token with these shares and with even ones.
    """

    source: dict[str, Any]
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    versions: dict[str, Any]
    ratio: dict[str, float]
    model_ratio: dict[str, float]
    linear_bytes: dict[str, float]
    model_bytes: dict[str, float]
    seconds: float | None
    stages: dict[str, float]
    n_resumed: int
    threads: int | None
    notes: tuple[str, ...]
    linears: tuple[Linear, ...]
    dense: tuple[Dense, ...]
    failed: tuple[str, ...]
    blocks: tuple[Block, ...]
    has_allocation: bool
    predicted_loss: float | None
    predicted_uniform: float | None

    @property
    def name(self) -> str:
        """Name of the model that was compressed."""
        return str(self.source.get("name") or "the model")

    @property
    def method(self) -> str:
        """Method of the recipe."""
        return str(self.recipe.get("method") or "unknown")

    @property
    def is_builtin_text(self) -> bool:
        """Whether the text for trying out calibrated it, or a range of that text."""
        spec = self.recipe.get("calibration")
        return isinstance(spec, str) and spec.partition("[")[0] == "builtin"

    @property
    def command(self) -> str:
        """What gives the same checkpoint again, beside its recipe; results depend on the threads."""
        threads = "" if self.threads is None else f" --threads {self.threads}"
        return f"cospadi compress MODEL --out NEW --recipe recipe.yaml{threads}"


def read_compression(data: Mapping[str, Any]) -> Compression:
    """Check the data of a compression.

    Raises
    ------
    InputError
        A value of the wrong type or not finite; the message names the place.
    """
    allocation = plain.mapping(data.get("allocation"), "allocation")
    losses = plain.numbers(allocation.get("losses"), "allocation.losses")
    even_losses = plain.numbers(allocation.get("even_losses"), "allocation.even_losses")
    sizes = plain.mapping(data.get("bytes"), "bytes")
    modules = plain.mapping(data.get("modules"), "modules")
    return Compression(
        source=plain.mapping(data.get("source"), "source"),
        recipe=plain.mapping(data.get("recipe"), "recipe"),
        calibration=plain.mapping(data.get("calibration"), "calibration"),
        versions=plain.mapping(data.get("versions"), "versions"),
        ratio=plain.numbers(data.get("ratio"), "ratio"),
        model_ratio=plain.numbers(data.get("model_ratio"), "model_ratio"),
        linear_bytes=plain.numbers(sizes.get("linears"), "bytes.linears"),
        model_bytes=plain.numbers(sizes.get("model"), "bytes.model"),
        seconds=plain.number(data.get("seconds"), "seconds"),
        stages=plain.numbers(data.get("stages"), "stages"),
        n_resumed=plain.count(data, "resumed", "report") or 0,
        threads=plain.count(data, "threads", "report"),
        notes=plain.names(_list(data, "notes"), "notes"),
        linears=tuple(
            _linear(name, item, losses.get(name), even_losses.get(name))
            for name, item in modules.items()
        ),
        dense=tuple(_dense(item, f"dense[{i}]") for i, item in enumerate(_list(data, "dense"))),
        failed=plain.names(_list(data, "failed"), "failed"),
        blocks=tuple(
            _block(item, f"reconstruction[{i}]")
            for i, item in enumerate(_list(data, "reconstruction"))
        ),
        has_allocation=bool(allocation),
        predicted_loss=plain.number(allocation.get("predicted_loss"), "allocation.predicted_loss"),
        predicted_uniform=plain.number(
            allocation.get("predicted_uniform"), "allocation.predicted_uniform"
        ),
    )


def _linear(
    name: str,
    item: Any,  # noqa: ANN401
    loss: float | None,
    even_loss: float | None,
) -> Linear:
    where = f"modules[{name!r}]"
    module = plain.mapping(item, where)
    history = plain.sequence(module.get("history") or [], f"{where}.history")
    last = plain.mapping(history[-1], f"{where}.history[-1]") if history else {}

    def text(key: str) -> str | None:
        value = module.get(key)
        return None if value is None else plain.text(value, f"{where}.{key}")

    def number(key: str) -> float | None:
        return plain.number(module.get(key), f"{where}.{key}")

    return Linear(
        name=name,
        d_in=plain.count(module, "d_in", where),
        d_out=plain.count(module, "d_out", where),
        n_identity=plain.count(module, "n_identity", where),
        n_atoms=plain.count(module, "n_atoms", where),
        sparsity=plain.count(module, "sparsity", where),
        coeffs_dtype=text("coeffs_dtype"),
        dictionary_dtype=text("dictionary_dtype"),
        leader=text("leader"),
        dense_bytes=plain.count(module, "dense_bytes", where),
        stored_bytes=plain.count(module, "stored_bytes", where),
        relative_error=number("relative_error"),
        weight_error=number("weight_error"),
        seconds=number("seconds"),
        whitening=plain.names(module.get("whitening") or [], f"{where}.whitening"),
        n_unused=plain.count(last, "n_unused", f"{where}.history[-1]"),
        loss=loss,
        even_loss=even_loss,
        n_tokens=plain.count(module, "n_tokens", where),
        n_dead_inputs=plain.count(module, "n_dead_inputs", where),
    )


def _dense(item: Any, where: str) -> Dense:  # noqa: ANN401
    entry = plain.mapping(item, where)
    return Dense(
        plain.text(plain.required(entry, "module", where), f"{where}.module"),
        plain.text(entry.get("reason", ""), f"{where}.reason"),
    )


def _block(item: Any, where: str) -> Block:  # noqa: ANN401
    entry = plain.mapping(item, where)
    return Block(
        block=plain.count(entry, "block", where),
        before=plain.number(entry.get("before"), f"{where}.before"),
        after=plain.number(entry.get("after"), f"{where}.after"),
        is_kept=bool(entry.get("is_kept", False)),
        seconds=plain.number(entry.get("seconds"), f"{where}.seconds"),
    )


def _list(data: Mapping[str, Any], key: str) -> Sequence[Any]:
    return plain.sequence(data.get(key) or [], key)
