"""Checkpoint files on disk: read, check, quantize and write them, without a model."""
