"""Evaluation: perplexity and generation by fixed protocols."""
