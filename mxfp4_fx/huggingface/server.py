"""The server of transformers (``transformers serve``) with a model that this package loads.

The server has no way to be given a model or a backend. Its one step that loads a model is replaced
while it runs; all else, its options and its endpoints among it, is transformers' own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from mxfp4_fx.core.errors import OptionError
from mxfp4_fx.huggingface.loading import from_pretrained

_MANAGER, _LOAD = "transformers.cli.serving.model_manager", "_load_model"
# Options of the server that say what the model becomes -> why they are refused.
_REFUSED = {
    "--compile": "the model is compiled with MXFP4 already, and this would compile it anew without",
    "--quantization": "the experts are in MXFP4, which another method cannot take",
}


def serve(path: str, options: Sequence[str], prepare: Callable[[Any], None]) -> None:
    """Serve one model over HTTP until the process is interrupted.

    Args:
        path: a checkpoint's directory, or a model's name on the Hub.
        options: further arguments of the command ``transformers serve``.
        prepare: compiles the model in place after it was loaded, before the server listens.

    Raises:
        OptionError: packages for the server are missing, transformers has another server, or an
            option is refused.
        CheckpointError: see :func:`mxfp4_fx.from_pretrained`.
    """
    for option in options:
        if (name := option.partition("=")[0]) in _REFUSED:
            raise OptionError(f"{name}: {_REFUSED[name]}. Leave the option out")
    manager, app = _found()

    def load(self: Any, model_id_and_revision: str, *_: Any, **__: Any) -> Any:
        model_id, _at, revision = model_id_and_revision.rpartition("@")
        model = from_pretrained(
            model_id,
            revision=revision,
            dtype=self.dtype,
            device_map=self.device,
            attn_implementation=self.attn_implementation,
        ).eval()
        prepare(model)
        return model

    before = getattr(manager, _LOAD)
    setattr(manager, _LOAD, load)
    try:
        app(["serve", path, *options], standalone_mode=False)
    finally:
        setattr(manager, _LOAD, before)


def _found() -> tuple[Any, Any]:
    """Return the class of transformers whose method loads models, and its commands.

    Raises:
        OptionError: they are not there, or packages that they need are not installed.
    """
    try:
        module = importlib.import_module(_MANAGER)
        app = importlib.import_module("transformers.cli.transformers").app
        checks = importlib.import_module("transformers.utils.import_utils")
    except ImportError as error:
        raise OptionError(
            f"the server needs a transformers with `transformers serve` and its packages "
            f"(pip install 'transformers[serving]'): {error}"
        ) from error
    if not checks.is_serve_available():
        raise OptionError("packages of the server are missing: pip install 'transformers[serving]'")
    manager = getattr(module, "ModelManager", None)
    if not hasattr(manager, _LOAD):
        raise OptionError(
            f"this transformers loads models for its server in another way than "
            f"ModelManager.{_LOAD}, which this replaces; transformers 5.23 is known to work"
        )
    return manager, app
