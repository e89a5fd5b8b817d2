"""Finished factors by module name; they lie in the work directory and are read when they are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping

from cospadi.errors import InputError
from cospadi.factor.sparse_factor import SparseFactor
from cospadi.factor.spec import FactorSpec
from cospadi.pipeline.workdir import ResultStore


class StoredFactors(MutableMapping[str, SparseFactor]):
    """Factors of one run, in the order of the plan.

    Parameters
    ----------
    store : ResultStore
        Holds them.
    leaders : mapping
        Module that owns the dictionary, by module name, in the order of the plan.
    """

    def __init__(self, store: ResultStore, leaders: Mapping[str, str]) -> None:
        self._store = store
        self._leaders = dict(leaders)
        self._specs: dict[str, FactorSpec] = {}
        self._changed: dict[str, SparseFactor] = {}

    def add(self, name: str, spec: FactorSpec) -> None:
        """Say that a factor is in the store."""
        self._specs[name] = spec

    @property
    def specs(self) -> dict[str, FactorSpec]:
        """Sizes of all factors; nothing is read."""
        return {name: self._specs[name] for name in self}

    def __getitem__(self, name: str) -> SparseFactor:
        """The factor, with its dictionary.

        Raises
        ------
        KeyError
            It is not finished.
        InputError
            Its files were changed or removed.
        """
        if name in self._changed:
            return self._changed[name]
        if name not in self._specs:
            raise KeyError(name)
        stored = self._store.load(name)
        if stored is None:
            raise InputError(
                f"{self._store.path}: the result of {name} was changed or removed; run the command again"
            )
        factor = stored[0]
        if factor.owns_dictionary or factor.dictionary is not None:
            return factor
        owner = self[self._leaders[name]]
        return dataclasses.replace(
            factor, dictionary=owner.dictionary, dictionary_scale=owner.dictionary_scale
        )

    def __setitem__(self, name: str, factor: SparseFactor) -> None:
        """Put another factor in its place, in memory."""
        self._changed[name] = factor
        self._specs[name] = factor.spec

    def __delitem__(self, name: str) -> None:
        del self._specs[name]
        self._changed.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._leaders if name in self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def __contains__(self, name: object) -> bool:
        return name in self._specs
