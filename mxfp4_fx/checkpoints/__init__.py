"""Checkpoints on the disk: read strictly, checked as a whole, quantized, written."""
