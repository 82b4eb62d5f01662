"""From a captured graph to a graph of MXFP4 ops. ``pipeline.py`` has the order."""
