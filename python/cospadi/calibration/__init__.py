"""Calibration: text to token batches, and the statistics of activations over them."""
