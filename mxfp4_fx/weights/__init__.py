"""Expert weights at run time: where they come from, swizzled once, found again in each call."""
