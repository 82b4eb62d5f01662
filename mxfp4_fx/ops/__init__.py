"""The ops in namespace ``mxfp4``: their meaning, their kernels, and their definitions for torch."""
