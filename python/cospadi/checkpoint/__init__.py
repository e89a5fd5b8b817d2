"""Reading, writing and checking compressed checkpoints (FORMAT.md)."""
