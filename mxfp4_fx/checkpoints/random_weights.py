"""Write a GPT-OSS checkpoint of random weights: the files, names and layouts of openai/gpt-oss-20b.

A small checkpoint serves to test loading, compiling and saving without a download. With 24 layers
and a vocabulary of 201088 it has exactly the tensors of gpt-oss-20b (459 tensors, 13761264768
bytes), for measurements. Weights are scaled so that every sublayer turns inputs of order one into
outputs of order one. This keeps a bf16 model of any width and depth in range.

A stream of uniform random bits indexes a table of equally likely values and so gives a tensor's
elements, a chunk at a time. The stream is seeded with the seed and the tensor's name, and numpy
keeps the raw streams of its bit generators stable between versions. So a tensor's bytes depend only
on the seed, its name and its shape.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numpy.random import PCG64DXSM
from tqdm import tqdm

from mxfp4_fx.checkpoints.files import INDEX
from mxfp4_fx.checkpoints.random_config import CheckpointShape, as_json, texts_of
from mxfp4_fx.checkpoints.safetensors_file import (
    SHARD_BYTES,
    TensorSpec,
    cut,
    index_of,
    require_new,
    require_room,
    take_place,
    write_safetensors,
)
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.core.formats import BLOCK, BYTES_PER_BLOCK, E2M1_VALUES, E8M0_BIAS

CHUNK_WORDS = 1 << 20  # random 64-bit words drawn at a time
DEFAULT_SHAPE = CheckpointShape()


def checkpoint_bytes(shape: CheckpointShape) -> int:
    """Return the bytes of all tensors: `total_size` in the checkpoint's index."""
    return sum(tensor.spec.nbytes for tensor in _tensors(shape))


def write_random_checkpoint(
    path: str | Path,
    shape: CheckpointShape = DEFAULT_SHAPE,
    *,
    seed: int = 0,
    max_shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Write the checkpoint directory `path`, which appears only when it is complete.

    Expert blocks and scales are uint8 [E, N, K/32, 16] and [E, N, K/32]; all other tensors are
    bf16. Names are those of openai/gpt-oss-20b. The directory also gets the configs and a
    byte-level tokenizer.

    Args:
        path: a directory that does not exist or is empty; its parents are created.
        shape: the sizes of the model.
        seed: the same seed and shape give the same bytes, whatever the shards.
        max_shard_bytes: tensor bytes in a shard; a larger tensor has a shard of its own.
        progress: show a progress bar if stderr is a terminal.

    Returns:
        `path` as an absolute path.

    Raises:
        CheckpointError: `path` exists and is not empty, or cannot be written; the disk has too
            little room; `tokenizers` is not installed. Nothing was written.
    """
    tensors, texts = list(_tensors(shape)), texts_of(shape)
    return write_tensors(path, tensors, texts, seed, max_shard_bytes, progress)


def write_tensors(
    path: str | Path,
    tensors: Sequence[RandomTensor],
    texts: Mapping[str, str],
    seed: int,
    max_shard_bytes: int,
    progress: bool,
) -> Path:
    """Write random tensors and `texts`, by the names of their files; see the function above."""
    path = Path(os.path.realpath(os.path.expanduser(path)))
    require_new(path)
    total = sum(tensor.spec.nbytes for tensor in tensors)
    require_room(path, total)
    shards = cut(tensors, lambda tensor: tensor.spec.nbytes, max_shard_bytes)
    index = index_of({name: [t.spec for t in shard] for name, shard in shards.items()})
    texts = {**texts, INDEX: as_json(index)}

    partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        bar = tqdm(total=total, unit="B", unit_scale=True, disable=None if progress else True)
        with bar:
            for name, shard in shards.items():
                parts = ((t.spec.name, c.data) for t in shard for c in t.chunks(seed))
                specs = [tensor.spec for tensor in shard]
                write_safetensors(partial / name, specs, parts, bar.update)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        take_place(partial, path)
    except BaseException as error:  # after an interrupt, too, nothing is left
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{path} cannot be written: {error}") from error
        raise
    return path


# ---- tensors ------------------------------------------------------------------------------------

Table = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | npt.NDArray[np.float32]
ANY_BYTE: Table = np.arange(256, dtype=np.uint8)


_DTYPES = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32}


class RandomTensor(NamedTuple):
    """A tensor to write; its elements are drawn from `table`, whose entries are equally likely."""

    name: str
    shape: tuple[int, ...]
    table: Table  # 256 bytes, 65536 bf16 bit patterns, or 65536 floats

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, _DTYPES[self.table.itemsize], self.shape)

    def chunks(self, seed: int) -> Iterator[Table]:
        digest = hashlib.sha256(f"{seed}/{self.name}".encode()).digest()
        bits = PCG64DXSM(int.from_bytes(digest, "little"))
        left = math.prod(self.shape)
        indexes = np.dtype(np.uint8 if len(self.table) == 256 else np.uint16)
        while left:
            words = min(CHUNK_WORDS, -(-left * indexes.itemsize // 8))
            index = bits.random_raw(words).view(indexes)[:left]
            yield index if self.table is ANY_BYTE else self.table[index]
            left -= len(index)


def _tensors(shape: CheckpointShape) -> Iterator[RandomTensor]:
    """Yield all tensors, layer by layer. A projection is written as (name, N, K)."""
    of, hidden, experts = RandomTensor, shape.hidden, shape.experts
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q))
    mlp = (("gate_up", 2 * shape.intermediate, hidden), ("down", hidden, shape.intermediate))
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        yield of(f"{layer}.input_layernorm.weight", (hidden,), normal(0.1, mean=1.0))
        for name, n, k in attention:
            yield of(f"{layer}.self_attn.{name}_proj.bias", (n,), normal(0.1))
            yield of(f"{layer}.self_attn.{name}_proj.weight", (n, k), normal(k**-0.5))
        yield of(f"{layer}.self_attn.sinks", (shape.heads,), normal(1.0))
        # The weight outweighs the bias, so that tokens choose different experts, and so that the
        # chosen experts get unequal weights.
        yield of(f"{layer}.mlp.router.bias", (experts,), normal(0.1))
        yield of(f"{layer}.mlp.router.weight", (experts, hidden), normal(2 * hidden**-0.5))
        for name, n, k in mlp:
            proj = f"{layer}.mlp.experts.{name}_proj"
            blocks = (experts, n, k // BLOCK, BYTES_PER_BLOCK)
            yield of(f"{proj}_bias", (experts, n), normal(0.1))
            yield of(f"{proj}_blocks", blocks, ANY_BYTE)
            yield of(f"{proj}_scales", blocks[:-1], scale_bytes(k))
        yield of(f"{layer}.post_attention_layernorm.weight", (hidden,), normal(0.1, mean=1.0))
    yield of("model.embed_tokens.weight", (shape.vocab, hidden), normal(1.0))
    yield of("model.norm.weight", (hidden,), normal(0.1, mean=1.0))
    yield of("lm_head.weight", (shape.vocab, hidden), normal(hidden**-0.5))


@cache
def _quantiles(count: int) -> npt.NDArray[np.float64]:
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])


@cache
def normal(std: float, mean: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> Table:
    """Return normally distributed float32 values, or bit patterns of bf16, rounded to nearest."""
    values = (mean + std * _quantiles(1 << 16)).astype(np.float32)
    if dtype is torch.float32:
        return values
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


@cache
def scale_bytes(k: int) -> Table:
    """Return E8M0 bytes that give uniformly random E2M1 codes the standard deviation k**-0.5."""
    code_rms = math.sqrt(sum(value**2 for value in E2M1_VALUES) / len(E2M1_VALUES))
    # Exponents e are normal with standard deviation 1, so log2(rms(2**e)) = mean(e) + ln(2).
    exponents = math.log2(k**-0.5 / code_rms) - math.log(2) + _quantiles(256)
    return (E8M0_BIAS + np.rint(exponents)).astype(np.uint8)
