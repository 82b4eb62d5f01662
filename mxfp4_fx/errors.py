"""What this package raises and warns of, by the name that users import."""

from mxfp4_fx.core.errors import *  # noqa: F403
