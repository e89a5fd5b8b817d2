"""Models: opening dense checkpoints, finding their linear layers, compressed layers."""
