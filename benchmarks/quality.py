"""What MXFP4 costs: a GPT-OSS is trained, its experts are quantized, held-out text is the judge.

A small GPT-OSS learns the documentation that comes with Python, byte by byte, and is saved as a
bfloat16 checkpoint. That is loaded with its experts in MXFP4, under either rule for the scales, and
runs as it is and compiled with backend="mxfp4", once with linears in MXFP8. Printed are the
perplexity of each on documents that it was not trained on, and how far the two rules move weights.

    python -m benchmarks.quality --output build/quality.json --plot build/quality.svg
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

import mxfp4_fx
from benchmarks import command, corpus, weight_error
from benchmarks.command import Log
from benchmarks.machine import machine
from benchmarks.report import column, columns, paragraphs
from mxfp4_fx.core.formats import SCALE_RULES

BF16_ROUNDING = 2.0**-8  # of a number, relatively


@dataclass(frozen=True)
class Settings:
    """A model and how it is trained and judged; the model reads bytes."""

    layers: int = 4
    hidden: int = 128
    intermediate: int = 128
    experts: int = 8
    experts_per_token: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    sliding_window: int = 64
    context: int = 256  # bytes that are predicted at a time
    batch: int = 16
    steps: int = 1200
    learning_rate: float = 3e-3
    seed: int = 0
    windows: int | None = None  # of validation text; all that there are if None
    windows_compared: int = 64  # whose logits are compared one by one
    samples: int = 1 << 21  # of each distribution of weights


TINY = Settings(
    layers=1, hidden=64, intermediate=96, experts=4, heads=2, kv_heads=1, head_dim=16,
    context=32, batch=4, steps=3, windows=8, windows_compared=4, samples=1 << 14,
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = command.parser(__doc__)
    parser.add_argument("--plot", type=Path, help="PNG or SVG to write")
    parser.add_argument("--checkpoint", type=Path, help="a new directory to keep the model in")
    parser.add_argument("--steps", type=int, help="of training")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    parser.add_argument("--inner", default="inductor", help="what compiles the rewritten graph")
    parser.add_argument("--tiny", action="store_true", help="a model that learns nothing, quickly")
    args = parser.parse_args(argv)
    if args.checkpoint and args.checkpoint.exists():
        parser.error(f"{args.checkpoint} exists already: name a new directory")
    log = command.start(args)

    changes = {"seed": args.seed} | ({"steps": args.steps} if args.steps else {})
    settings = replace(TINY if args.tiny else Settings(), **changes)
    texts = corpus.split(corpus.documents())
    results: dict[str, Any] = {
        "machine": machine(),
        "settings": asdict(settings),
        "text": {"train": described(texts.train), "validation": described(texts.validation)},
    }
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = args.checkpoint or Path(temporary) / "checkpoint"
        results["training"] = train(settings, texts.train, checkpoint, log)
        windows = cut(texts.validation, settings)
        results |= judge(settings, checkpoint, windows, args.inner, log)
        samples = weight_error.distributions(settings.samples, settings.seed)
        samples["the trained experts"] = expert_weights(checkpoint)
        results["weights"] = weight_error.errors(samples)
    command.finish(args, results, text(results))
    return 0


def text(results: dict[str, Any]) -> str:
    """The results as tables."""
    validation, context = results["text"]["validation"], results["settings"]["context"]
    models = [
        {
            **row,
            "name": f"{'MXFP4, ' * (row['weights'] != 'bfloat16')}{row['weights']} "
            f"{'compiled' if row['compiled'] else 'uncompiled'}",
        }
        for row in results["models"]
    ]
    models.append({"name": "search less max", "to_bfloat16": results["search_to_max"]})
    if linears := results.get("linears_in_mxfp8"):  # older results lack it
        models.append({**linears, "name": "MXFP4, max, and linears in MXFP8, compiled"})
        models.append({"name": "that less max, compiled", "to_bfloat16": linears["to_max"]})
    for rule, apart in results["compiled_to_uncompiled"].items():
        models.append({"name": f"{rule}, compiled less uncompiled", "to_bfloat16": apart})
    shown = {
        "experts": column("name"),
        "KiB": column("expert_bytes", "{:.0f}", 1024),
        "perplexity": column("perplexity", "{:.4f}"),
        "to bfloat16": column("to_bfloat16/perplexity", "{:+.4f}"),
        "± s.e.": column("to_bfloat16/standard_error", "{:.4f}"),
    }
    logits = {
        "rule": column("rule"),
        "difference": column("difference", "{:.4f}"),
        "bound": column("bound", "{:.4f}"),
        "bytes compared": column("bytes_compared"),
    }
    return paragraphs(
        f"perplexity of a byte; {results['windows']} windows of {context} bytes from "
        f"{validation['documents']} documents that were not trained on",
        columns(models, shown),
        "largest difference of a logit, compiled against uncompiled",
        columns(({"rule": rule, **row} for rule, row in results["logits"].items()), logits),
        weight_error.text(results["weights"]),
    )


# ---- text ---------------------------------------------------------------------------------------


def described(texts: dict[str, str]) -> dict[str, Any]:
    """What a text was, for whoever wants to know whether two results have the same."""
    data = corpus.as_bytes(texts.values())
    digest = hashlib.sha256(data).hexdigest()
    return {"documents": len(texts), "bytes": len(data), "sha256": digest}


def as_ids(texts: dict[str, str]) -> Tensor:
    return torch.frombuffer(bytearray(corpus.as_bytes(texts.values())), dtype=torch.uint8)


def cut(texts: dict[str, str], settings: Settings) -> Tensor:
    """Windows [W, context + 1] of uint8, each beginning with the byte that the last ended with.

    W is a multiple of the batch, so that all calls have one shape.
    """
    windows = as_ids(texts).unfold(0, settings.context + 1, settings.context)
    count = min(len(windows), settings.windows or len(windows))
    return windows[: count - count % settings.batch]


# ---- training -----------------------------------------------------------------------------------


def train(settings: Settings, texts: dict[str, str], checkpoint: Path, log: Log) -> dict[str, Any]:
    """Trains in float32 and saves in bfloat16; returns what it took and the last losses."""
    torch.manual_seed(settings.seed)
    config = GptOssConfig(
        num_hidden_layers=settings.layers,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_local_experts=settings.experts,
        num_experts_per_tok=settings.experts_per_token,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.head_dim,
        sliding_window=settings.sliding_window,
        vocab_size=256,
        router_aux_loss_coef=0.01,
    )
    config._experts_implementation = "eager"  # the fastest to train on a CPU
    model = GptOssForCausalLM(config).train()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    log(f"training {parameters / 1e6:.1f} million parameters for {settings.steps} steps")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: rate(at, settings.steps))
    losses = []
    started = time.perf_counter()
    for number, ids in enumerate(batches(settings, as_ids(texts)), start=1):
        # The loss that is trained has a part that spreads the tokens over the experts.
        out = model(input_ids=ids[:, :-1], output_router_logits=True)
        loss = nll(out.logits, ids[:, 1:]).mean()
        (loss + config.router_aux_loss_coef * out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if number % 50 == 0:
            speed = number * ids[:, 1:].numel() / (time.perf_counter() - started)
            mean = sum(losses[-50:]) / 50
            log(f"{number}: perplexity {math.exp(mean):.3f}, {speed:.0f} bytes a second")
    seconds = time.perf_counter() - started
    model.to(torch.bfloat16).save_pretrained(checkpoint)
    last = losses[-50:]
    return {
        "parameters": parameters,
        "seconds": seconds,
        "last_perplexity": math.exp(sum(last) / len(last)),
    }


def rate(at: int, steps: int) -> float:
    """Of the learning rate: a rise over a twentieth of the steps, then a cosine to a tenth."""
    rise = max(1, steps // 20)
    if at < rise:
        return (at + 1) / rise
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (at - rise) / max(1, steps - rise)))


def batches(settings: Settings, ids: Tensor) -> Iterator[Tensor]:
    """[batch, context + 1] int64, from anywhere in the text."""
    generator = torch.Generator().manual_seed(settings.seed)
    offsets = torch.arange(settings.context + 1)
    for _ in range(settings.steps):
        starts = torch.randint(
            len(ids) - settings.context, (settings.batch, 1), generator=generator
        )
        yield ids[starts + offsets].long()


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood [B, T] in nats, of logits [B, T, vocabulary]."""
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


# ---- judging ------------------------------------------------------------------------------------


def judge(
    settings: Settings, checkpoint: Path, windows: Tensor, inner: str, log: Log
) -> dict[str, Any]:
    """Perplexities, their differences, and how far compiled logits are from uncompiled ones."""
    log(f"judging on {len(windows)} windows: bfloat16")
    losses: dict[tuple[str, bool], Tensor] = {}
    expert_bytes = {}
    model = GptOssForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    losses["bfloat16", False] = window_losses(model, windows, settings)
    expert_bytes["bfloat16"] = bytes_of_experts(model)

    compared = windows[: settings.windows_compared]
    agreement = {}
    for rule in SCALE_RULES:
        log(f"MXFP4, scale_rule={rule!r}: float32 to know the exact logits, bfloat16, compiled")
        packed: dict[str, Any] = {"scale_rule": rule}
        model = mxfp4_fx.from_pretrained(checkpoint, dtype=torch.float32, **packed).eval()
        exact = run(model, compared, settings)
        model = mxfp4_fx.from_pretrained(checkpoint, dtype=torch.bfloat16, **packed).eval()
        expert_bytes[rule] = bytes_of_experts(model)
        losses[rule, False] = window_losses(model, windows, settings)
        plain = run(model, compared, settings)
        model.compile(backend="mxfp4", options={"inner": inner, "strict": True})
        losses[rule, True] = window_losses(model, windows, settings)
        agreement[rule] = check_agreement(exact, plain, run(model, compared, settings))

    log("compiled, with linears in MXFP8")
    model = mxfp4_fx.from_pretrained(checkpoint, dtype=torch.bfloat16, scale_rule="max").eval()
    options = {"inner": inner, "strict": True, "linears": "mxfp8"}
    model.requires_grad_(False).compile(backend="mxfp4", options=options)
    in_mxfp8 = window_losses(model, windows, settings)

    reference = losses["bfloat16", False]
    return {
        "windows": len(windows),
        "models": [
            {
                "weights": weights,
                "compiled": compiled,
                "expert_bytes": expert_bytes[weights],
                "perplexity": math.exp(loss.mean().item()),
                "to_bfloat16": difference(loss, reference),
            }
            for (weights, compiled), loss in losses.items()
        ],
        "search_to_max": difference(losses["search", True], losses["max", True]),
        "linears_in_mxfp8": {
            "perplexity": math.exp(in_mxfp8.mean().item()),
            "to_bfloat16": difference(in_mxfp8, reference),
            "to_max": difference(in_mxfp8, losses["max", True]),
        },
        "compiled_to_uncompiled": {
            rule: difference(losses[rule, True], losses[rule, False]) for rule in SCALE_RULES
        },
        "logits": agreement,
    }


@torch.inference_mode()
def window_losses(model: Any, windows: Tensor, settings: Settings) -> Tensor:
    """The mean negative log likelihood [W] of each window, float64, in nats."""
    return torch.cat(
        [
            nll(model(ids[:, :-1]).logits.double(), ids[:, 1:]).mean(1)
            for ids in windows.long().split(settings.batch)
        ]
    )


@dataclass(frozen=True)
class Run:
    """Of W windows: float64 logits [W, T, vocabulary], and who serves each byte in each layer."""

    logits: Tensor
    experts: Tensor  # [W, T, layers, E] bool; none where a tie makes the choice


@torch.inference_mode()
def run(model: Any, windows: Tensor, settings: Settings) -> Run:
    logits, experts = [], []
    for ids in windows[:, :-1].long().split(settings.batch):
        out = model(ids, output_router_logits=True)
        scores = torch.stack(out.router_logits, dim=1)  # [batch * T, layers, E]
        top_k = settings.experts_per_token
        chosen = scores >= scores.topk(top_k).values[..., -1:]
        chosen &= chosen.sum(-1, keepdim=True) == top_k
        logits.append(out.logits.double())
        experts.append(chosen.unflatten(0, ids.shape))
    return Run(torch.cat(logits), torch.cat(experts))


def difference(losses: Tensor, reference: Tensor) -> dict[str, float]:
    """Of two models' perplexities, with its standard error.

    Both models read the same windows, so the error is that of the mean of the windows' differences:
    how hard a text is falls out. It says what other text would change, not another training.
    """
    apart = losses - reference
    base = math.exp(reference.mean().item())
    mean, error = apart.mean().item(), apart.std().item() / math.sqrt(len(apart))
    return {
        "perplexity": base * math.expm1(mean),
        "standard_error": base * math.exp(mean) * error,  # of exp(mean), to first order
        "nats": mean,
        "nats_standard_error": error,
    }


def check_agreement(exact: Run, plain: Run, fused: Run) -> dict[str, float]:
    """How far a compiled model's logits are from the uncompiled one's, and may be.

    The weights are the same MXFP4 values, so nothing but rounding differs. The uncompiled bfloat16
    model misses the float32 logits by e at most, measured here. The compiled one rounds elsewhere:
    as another sample of the same error it may miss them by 2e and, at the end, by the rounding of a
    logit. The two are apart by the sum.

    Rounding may also send a byte to another expert, which is another function. So a window is
    compared up to the first byte that is not served by the same experts in all three runs.
    """
    same = exact.experts.any(-1)
    for other in (plain, fused):
        same &= (other.experts == exact.experts).all(-1)
    compared = same.all(-1).long().cumprod(1).bool()
    if not compared.any():
        raise SystemExit("no logits to compare: every window begins with a byte of other experts")

    def largest(logits: Tensor) -> float:
        return logits[compared].abs().max().item()

    e = largest(plain.logits - exact.logits)
    bound = e + 2 * e + BF16_ROUNDING * largest(exact.logits)
    apart = largest(fused.logits - plain.logits)
    if not apart <= bound:
        raise SystemExit(
            f"compiled logits differ by {apart:.4f} from uncompiled ones, rounding explains "
            f"{bound:.4f}: please report this"
        )
    return {
        "bytes_compared": int(compared.sum()),
        "uncompiled_error": e,
        "compiled_error": largest(fused.logits - exact.logits),
        "difference": apart,
        "bound": bound,
    }


def bytes_of_experts(model: Any) -> int:
    """Of the weights that MXFP4 is about: no biases."""
    return sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if ".experts." in name and not name.endswith("_bias")
    )


def expert_weights(checkpoint: Path) -> Tensor:
    """All weights of the trained experts in bfloat16, those of a block side by side."""
    model = GptOssForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    return torch.cat(
        [
            parameter.detach().transpose(1, 2).flatten()
            for name, parameter in model.named_parameters()
            if name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
