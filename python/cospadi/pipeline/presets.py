"""Named settings to start from: ``preset: paper`` in a recipe, ``--preset paper`` on the command line."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # What is recommended; every recipe starts from these values.
    "fast": {},
    # CoSpaDi (arXiv 2509.22075 version 6), section 4.1 and table 8: 60 alternations of OMP and strictly sequential
    # K-SVD with 8 power iterations, started from columns of the weight, K / s = 2, the coefficients of the last sweep
    # truncated to 14 bits so that they pay for the mask (Eq. 11), 256 windows of 1024 tokens.
    "paper": {
        "dictionary": "learned",
        "solver": "omp",
        "iterations": 60,
        "tolerance": 0.0,
        "update": "ksvd",
        "power_iterations": 8,
        "block_size": 1,
        "sweeps": 1,
        "unused": "skip",
        "init": "columns",
        "refit": False,
        "k_over_s": 2.0,
        "ratio_convention": "nominal",
        "coeffs_dtype": "bfloat14",
        "coeffs_rounding": "truncate",
        "coding_batch": 8192,
        "samples": 256,
        "sequence_length": 1024,
        "group_objective": "averaged",
        "seed": 42,
    },
    # Several times the time of `fast`, for the best model of a size: identity atoms beside learned ones, errors and
    # bytes weighed by what they do to the prediction (docs/results.md).
    "best": {
        "dictionary": "augmented",
        "output_metric": "fisher",
        "allocation": "loss",
        "backward_samples": 24,
        "first_penalty": 0.003,
        "penalty_growth": 1.03,
    },
}
