"""``python -m mxfp4_fx``: what this machine will use, what a model would become, checkpoints."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence

import torch

from mxfp4_fx.checkpoints import quantize, random_weights
from mxfp4_fx.core.errors import KernelsUnavailableError, Mxfp4Error
from mxfp4_fx.core.version import __version__
from mxfp4_fx.explanation import explain
from mxfp4_fx.ops import target


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; a failure that has a name, or is the system's, is told without a traceback.

    Returns:
        The exit status: 0, 1 after a failure, 130 after an interrupt; argparse exits with 2.
    """
    parser = argparse.ArgumentParser(prog="python -m mxfp4_fx", description=__doc__)
    parser.add_argument("--version", action="version", version=f"mxfp4_fx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    doctor = commands.add_parser("doctor", help="what this machine will use, and why")
    doctor.set_defaults(run=_doctor)

    explained = commands.add_parser("explain", help="what would be rewritten in a model, and why")
    explained.add_argument("checkpoint", help="a GPT-OSS directory (its config.json is enough)")
    explained.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16"
    )
    explained.add_argument(
        "--experts", help="dense experts, run by this implementation of transformers"
    )
    explained.add_argument("--json", action="store_true", help="the same as data")
    explained.set_defaults(run=_explain)

    written = commands.add_parser("checkpoint", help="write a random GPT-OSS checkpoint")
    random_weights.add_arguments(written)
    written.set_defaults(run=random_weights.run)

    quantized = commands.add_parser("quantize", help="quantize a GPT-OSS checkpoint to MXFP4")
    quantize.add_arguments(quantized)
    quantized.set_defaults(run=quantize.run)

    args = parser.parse_args(argv)
    try:
        status = int(args.run(args) or 0)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a failure is told
        return status
    except BrokenPipeError:  # whoever read the output has closed it, and may be right
        # Python would try once more to write what is left, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Mxfp4Error, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _doctor(args: argparse.Namespace) -> None:
    print(f"mxfp4_fx {__version__}")
    print(f"Python {platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores")
    for package in ("torch", "transformers", "triton", "kernels"):
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} is not installed")
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in devices:
        try:
            chosen = target.choose(device)
            print(f"{device}: {chosen.kernels} kernels, layout {chosen.layout}: {chosen.reason}")
        except KernelsUnavailableError as error:
            print(f"{device}: experts stay as they are: {error}")


def _explain(args: argparse.Namespace) -> None:
    from mxfp4_fx.huggingface.loading import empty_model

    with empty_model(args.checkpoint, getattr(torch, args.dtype), args.experts) as model:
        ids = torch.zeros((1, 8), dtype=torch.long)
        with torch.no_grad():
            explanation = explain(model, ids)
    print(json.dumps(explanation.to_dict(), indent=2) if args.json else explanation)
