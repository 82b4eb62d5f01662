"""Models of Hugging Face transformers. Importing ``quantizer`` and ``unpacking`` needs it."""
