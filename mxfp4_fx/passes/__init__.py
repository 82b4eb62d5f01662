"""The passes from a captured graph to a graph of MXFP4 ops. ``pipeline.py`` has their order."""
