"""Expert weights at run time: their sources, swizzled once and looked up in each call."""
