"""The command ``mxfp4_fx``: looks at machines and models, writes checkpoints, serves a model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from mxfp4_fx.checkpoints.gpt_oss import MODEL_TYPE
from mxfp4_fx.checkpoints.quantize import quantize_checkpoint
from mxfp4_fx.checkpoints.random_config import CheckpointShape
from mxfp4_fx.checkpoints.random_weights import write_random_checkpoint
from mxfp4_fx.checkpoints.rounding import read_rounding
from mxfp4_fx.checkpoints.safetensors_file import SHARD_BYTES
from mxfp4_fx.core.console import announced
from mxfp4_fx.core.errors import CheckpointError, Mxfp4Error, OptionError
from mxfp4_fx.core.formats import SCALE_RULES
from mxfp4_fx.core.version import OLDEST_FOR_FAMILIES, __version__
from mxfp4_fx.doctor import examine
from mxfp4_fx.explanation import explain
from mxfp4_fx.layerwise import compile
from mxfp4_fx.warming import warmup


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; print an `Mxfp4Error` or `OSError` without a traceback.

    Returns:
        The exit status: 0, 1 after a failure, 130 after an interrupt; argparse exits with 2.
    """
    is_module = os.path.basename(sys.argv[0]) == "__main__.py"
    prog = "python -m mxfp4_fx" if is_module else "mxfp4_fx"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("--version", action="version", version=f"mxfp4_fx {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    text = "what this machine will use, and why, with a self-check; exits with 1 if it fails"
    doctor = commands.add_parser("doctor", help=text)
    text = "look at this device only (cpu, cuda:0); may be given several times"
    doctor.add_argument("--device", type=_device, action="append", default=[], help=text)
    doctor.set_defaults(run=_doctor)

    explained = commands.add_parser("explain", help="what would be rewritten in a model, and why")
    explained.add_argument(
        "checkpoint",
        help="a checkpoint; its config.json is enough, and headers of weights are read",
    )
    explained.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16"
    )
    explained.add_argument(
        "--experts", help="dense experts, run by this implementation of transformers"
    )
    explained.add_argument("--json", action="store_true", help="the same as data")
    text = "write it as one HTML file, too, with the graphs before and after"
    explained.add_argument("--html", type=Path, metavar="FILE", help=text)
    explained.set_defaults(run=_explain)

    _add_checkpoint(commands.add_parser("checkpoint", help="write a random checkpoint"))
    _add_quantize(commands.add_parser("quantize", help="quantize a checkpoint's experts to MXFP4"))
    text = "transformers' server with the model compiled; takes the options of `transformers serve`"
    _add_serve(commands.add_parser("serve", help=text, description=text, allow_abbrev=False))

    args, others = parser.parse_known_args(argv)
    if args.command == "serve":
        args.others = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    try:
        status = int(args.run(args) or 0)
        if sys.stdout is not None:
            sys.stdout.flush()  # inside this try, so that a failure is handled below
        return status
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        # Otherwise Python would flush stdout again when it exits, and print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Mxfp4Error, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _doctor(args: argparse.Namespace) -> int:
    return examine(args.device)


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).partition("\n")[0]) from None


def _explain(args: argparse.Namespace) -> None:
    from mxfp4_fx.huggingface.loading import empty_model

    with empty_model(args.checkpoint, getattr(torch, args.dtype), args.experts) as model:
        ids = torch.zeros((1, 8), dtype=torch.long)
        with torch.no_grad(), announced("capturing the model"):
            explanation = explain(model, ids)
    errors = read_rounding(Path(args.checkpoint).expanduser())
    explanation = dataclasses.replace(explanation, rounding_errors=errors)
    if args.html is not None:
        explanation.save_html(args.html)
    print(json.dumps(explanation.to_dict(), indent=2) if args.json else explanation)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the arguments: the directory, a flag for each size, the seed and the size of shards."""
    parser.description = "Write a checkpoint of random weights, a GPT-OSS in MXFP4 for example."
    parser.add_argument("out", type=Path, help="directory to write: a new or an empty one")
    text = "another family, qwen3_moe for example, in the sizes of its own model (%(default)s)"
    parser.add_argument("--family", default=MODEL_TYPE, metavar="NAME", help=text)
    text = "write the experts of another family in bfloat16 instead of MXFP4"
    parser.add_argument("--dense", action="store_true", help=text)
    for size in dataclasses.fields(CheckpointShape):
        flag, text = f"--{size.name.replace('_', '-')}", f"{size.metadata['help']} ({size.default})"
        parser.add_argument(flag, type=int, metavar="N", help=text)
    text = "same seed and sizes, same bytes (%(default)s)"
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=text)
    _add_max_shard_bytes(parser)
    parser.set_defaults(run=_checkpoint)


def _checkpoint(args: argparse.Namespace) -> None:
    names = [size.name for size in dataclasses.fields(CheckpointShape)]
    sizes = {name: size for name in names if (size := getattr(args, name)) is not None}
    options = {"seed": args.seed, "max_shard_bytes": args.max_shard_bytes}
    if args.family != MODEL_TYPE:
        try:
            from mxfp4_fx.huggingface.random_family import write_random_family
        except ImportError as error:
            raise CheckpointError(
                f"--family needs transformers {OLDEST_FOR_FAMILIES} or newer "
                f"(pip install --upgrade transformers): {error}"
            ) from error
        path = write_random_family(args.out, args.family, sizes, dense=args.dense, **options)
    elif args.dense:
        raise OptionError("--dense is for other families than GPT-OSS: name one with --family")
    else:
        path = write_random_checkpoint(args.out, CheckpointShape(**sizes), **options)
    print(f"wrote {path}")


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a checkpoint's directory, its experts dense")
    parser.add_argument("out", type=Path, help="directory to write: a new or an empty one")
    text = "modules whose experts stay dense: parts of their names (layers.0), * for any others"
    parser.add_argument(
        "--skip", action="extend", nargs="+", default=[], metavar="PATTERN", help=text
    )
    text = "scale of a block: the largest value decides, or the least squared error (%(default)s)"
    parser.add_argument("--scale-rule", choices=SCALE_RULES, default="max", help=text)
    _add_max_shard_bytes(parser)
    parser.set_defaults(run=_quantize)


def _quantize(args: argparse.Namespace) -> int:
    errors: dict[str, float] = {}
    try:
        path = quantize_checkpoint(
            args.source,
            args.out,
            skip=args.skip,
            scale_rule=args.scale_rule,
            max_shard_bytes=args.max_shard_bytes,
            report=errors.update,
        )
    except KeyboardInterrupt:
        print("interrupted: the same command goes on after the last whole shard", file=sys.stderr)
        return 130
    for experts, error in errors.items():
        print(f"{experts}: rounding changed the weights by {error:.2%}")
    print(f"wrote {path}")
    return 0


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a GPT-OSS directory, or a name on the Hub")
    text = "numbers of tokens of prompts to compile for before the server listens (%(default)s)"
    parser.add_argument("--lengths", type=int, nargs="*", default=[64, 65], metavar="N", help=text)
    text = "numbers of prompts that requests have at once, for the same (%(default)s)"
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1], metavar="N", help=text)
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> None:
    from mxfp4_fx.huggingface.server import serve

    def prepare(model: nn.Module) -> None:
        compile(model)
        if args.lengths:
            warmup(model, lengths=args.lengths, batch_sizes=args.batch_sizes)

    serve(args.checkpoint, args.others, prepare)


def _add_max_shard_bytes(parser: argparse.ArgumentParser) -> None:
    text = "tensor bytes in a shard (%(default)s)"
    parser.add_argument("--max-shard-bytes", type=int, default=SHARD_BYTES, metavar="N", help=text)
