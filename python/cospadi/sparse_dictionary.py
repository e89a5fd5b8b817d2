"""K-SVD as an estimator of scikit-learn, which has to be installed for this module alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from cospadi.errors import install_command
from cospadi.sparse_coding import Selection, ksvd, omp

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        f"cospadi.SparseDictionary needs scikit-learn: {install_command('sklearn')}"
    ) from error

DTYPES = (np.float64, np.float32)


class SparseDictionary(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Dictionary in which every sample is a sum of exactly `sparsity` atoms.

    Parameters
    ----------
    n_atoms : int, optional
        Atoms to learn; as many as there are features by default.
    sparsity : int, optional
        Atoms per sample; a tenth of the atoms by default, at least one.
    iterations : int
        Alternations of coding and atom update.
    selection : {"omp", "ormp"}
        See `cospadi.omp`.
    tolerance : float
        Stop when the relative error falls by less than this share in one iteration; 0 runs all.
    random_state : int, RandomState or None
        Of the start.
    num_threads : int, optional
        Default ``torch.get_num_threads()``.

    Attributes
    ----------
    components_ : numpy.ndarray
        ``[n_atoms, n_features]``, unit-norm rows.
    errors_ : tuple of float
        Relative error on the training samples after every iteration.
    n_iter_ : int
        Iterations that were run.
    """

    def __init__(
        self,
        n_atoms: int | None = None,
        sparsity: int | None = None,
        *,
        iterations: int = 10,
        selection: Selection = "omp",
        tolerance: float = 0.0,
        random_state: int | np.random.RandomState | None = None,
        num_threads: int | None = None,
    ) -> None:
        self.n_atoms = n_atoms
        self.sparsity = sparsity
        self.iterations = iterations
        self.selection = selection
        self.tolerance = tolerance
        self.random_state = random_state
        self.num_threads = num_threads

    def fit(self, X: Any, y: object = None) -> SparseDictionary:  # noqa: ANN401
        """Learn the dictionary of samples ``X [n_samples, n_features]``; ``y`` is ignored."""
        samples = validate_data(self, X, dtype=DTYPES)
        n_atoms = samples.shape[1] if self.n_atoms is None else self.n_atoms
        self.sparsity_ = max(1, n_atoms // 10) if self.sparsity is None else self.sparsity
        found = ksvd(
            samples,
            n_atoms,
            self.sparsity_,
            iterations=self.iterations,
            selection=self.selection,
            tolerance=self.tolerance,
            seed=int(check_random_state(self.random_state).randint(2**31 - 1)),
            num_threads=self.num_threads,
        )
        self.components_ = found.atoms
        self.errors_ = found.errors
        self.n_iter_ = len(found.errors)
        return self

    def transform(self, X: Any) -> np.ndarray:  # noqa: ANN401
        """Code ``[n_samples, n_atoms]`` of samples, in their type, zeros off the supports."""
        check_is_fitted(self)
        samples = validate_data(self, X, dtype=DTYPES, reset=False)
        atoms = self.components_.astype(samples.dtype, copy=False)
        code = omp(
            atoms, samples, self.sparsity_, selection=self.selection, num_threads=self.num_threads
        )
        return code.dense()

    def inverse_transform(self, X: Any) -> np.ndarray:  # noqa: ANN401
        """Samples ``[n_samples, n_features]`` of a code."""
        check_is_fitted(self)
        result: np.ndarray = np.asarray(X) @ self.components_
        return result

    @property
    def _n_features_out(self) -> int:
        return int(self.components_.shape[0])

    def __sklearn_tags__(self) -> Any:  # noqa: ANN401
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
