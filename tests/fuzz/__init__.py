"""Fuzzers: of captured graphs (``graphs.py``), and of lives of models (``lives.py``)."""
