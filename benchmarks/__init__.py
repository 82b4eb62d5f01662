"""Measurements: ``python -m benchmarks.cpu``; likewise gpu, full_size, quality, weight_error."""
