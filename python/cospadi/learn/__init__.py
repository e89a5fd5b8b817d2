"""Fitting one weight: whitening, budget, initial dictionary, alternation, refit."""
