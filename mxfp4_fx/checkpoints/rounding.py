"""What rounding did to a checkpoint's experts, in a file beside them; no other program reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mxfp4_fx.checkpoints.files import AGAIN, ROUNDING, read_json
from mxfp4_fx.core.errors import CheckpointError

_ERRORS = "rounding_errors"


def write_rounding(directory: Path, errors: Mapping[str, float], scale_rule: str) -> Path:
    """Write the relative errors of experts' weights, by the experts' names in the files."""
    content: dict[str, Any] = {"scale_rule": scale_rule, _ERRORS: dict(errors)}
    file = directory / ROUNDING
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return file


def read_rounding(directory: Path) -> dict[str, float]:
    """Return what `write_rounding` wrote, or nothing if it wrote nothing.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = directory / ROUNDING
    if not file.is_file():
        return {}
    errors = read_json(file).get(_ERRORS)
    if isinstance(errors, dict) and all(isinstance(error, float) for error in errors.values()):
        return errors
    raise CheckpointError(f"{file} has no {_ERRORS} that are numbers: {AGAIN}, or remove it")
