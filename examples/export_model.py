"""Export a model in MXFP4, and run the package in a process without transformers and the model.

Makes a tiny GPT-OSS of random weights with packed experts (``--dense``: as transformers makes it),
exports it for any length up to 64, and lets a fresh Python process load the package and compute
logits. Dense experts are quantized for the package, so its logits are further off.

    python examples/export_model.py --path build/model.pt2
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim
from transformers import GptOssConfig, GptOssForCausalLM

import mxfp4_fx

# What another process does. It hides transformers, to show that nothing needs it.
USE = """
import sys

sys.modules["transformers"] = None

import torch
import mxfp4_fx

package, inputs, results = sys.argv[1:]
model = mxfp4_fx.load_exported(package)
print("loaded:", model.inputs)
outputs = [model(input_ids=ids, use_cache=False) for ids in torch.load(inputs)]
torch.save([output["logits"] for output in outputs], results)
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", type=Path, help="the package to write; by default, a temporary")
    parser.add_argument("--dense", action="store_true", help="export experts that are not packed")
    parser.add_argument("--layers", type=int, default=1)
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = args.path or Path(folder, "model.pt2")
        path.parent.mkdir(parents=True, exist_ok=True)
        model = tiny_model(Path(folder, "checkpoint"), args.layers, args.dense)

        ids = prompt(5)
        length = Dim("T", min=1, max=64)
        explanation = mxfp4_fx.export(
            model,
            (),
            path,
            kwargs={"input_ids": ids, "use_cache": False},
            dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
            options={"strict": True},
        )
        print(explanation)
        print(f"{path.name}: {path.stat().st_size / 2**20:.1f} MiB")

        prompts = [prompt(tokens) for tokens in (1, 5, 64)]
        logits = in_another_process(path, prompts, Path(folder))
        for one, found in zip(prompts, logits, strict=True):
            expected = model(input_ids=one, use_cache=False).logits
            off = (found - expected).abs().max() / expected.abs().max()
            print(f"{one.shape[1]} tokens: off by {off:.1e} of the largest logit")
    return 0


def in_another_process(path: Path, prompts: list[Tensor], folder: Path) -> list[Tensor]:
    inputs, results = folder / "inputs.pt", folder / "results.pt"
    torch.save(prompts, inputs)
    subprocess.run([sys.executable, "-c", USE, path, inputs, results], check=True)
    loaded: list[Tensor] = torch.load(results)
    return loaded


def prompt(tokens: int) -> Tensor:
    return torch.randint(0, 128, (1, tokens), generator=torch.Generator().manual_seed(tokens))


def tiny_model(folder: Path, layers: int, is_dense: bool) -> GptOssForCausalLM:
    torch.manual_seed(0)
    config = GptOssConfig(
        num_hidden_layers=layers,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = GptOssForCausalLM(config).eval()
    if is_dense:
        return model
    model.save_pretrained(folder)
    packed: GptOssForCausalLM = mxfp4_fx.from_pretrained(folder)  # quantizes what is dense
    return packed.eval()


if __name__ == "__main__":
    raise SystemExit(main())
