"""Command line: parses, calls the pipeline, prints. Heavy imports happen inside the commands."""
