"""The ops in namespace ``mxfp4``: what they mean, who computes them, how torch sees them."""
