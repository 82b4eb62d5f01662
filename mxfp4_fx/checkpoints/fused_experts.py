"""Dense files of other families than GPT-OSS that hold all experts of a layer in one tensor.

Qwen3.5's and Qwen3-VL's files are so, and those that ``save_original_format=False`` of transformers
writes: "model.layers.0.mlp.experts.gate_up_proj" [E, 2I, K], with the rows of all gates before
those of up, and "down_proj" [E, N, K]. In MXFP4 they become single matrices, under the names that
the family's loader merges.

Shape letters: E experts, I intermediate, N output rows, K contraction.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor

from mxfp4_fx.checkpoints.checkpoint import Checkpoint
from mxfp4_fx.checkpoints.files import AGAIN
from mxfp4_fx.checkpoints.gpt_oss import FLOATS
from mxfp4_fx.checkpoints.safetensors_file import StoredTensor, TensorSpec
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.core.formats import BLOCK

_FUSED = re.compile(r"^(.*\.experts)\.(gate_up_proj|down_proj)$")
# How single matrices of gate, up and down are named in a family's files -> the families, by the
# model_type of their (text) config. transformers merges these names.
_NAMES = {
    ("gate_proj", "up_proj", "down_proj"): (
        *("deepseek_v2", "deepseek_v3", "dots1", "exaone_moe", "flex_olmo", "glm4_moe"),
        *("glm4_moe_lite", "hunyuan_v1_moe", "olmoe", "qwen2_moe", "qwen3_5_moe_text"),
        *("qwen3_moe", "qwen3_next", "qwen3_vl_moe_text", "solar_open"),
    ),
    ("w1", "w3", "w2"): ("minimax_m2", "mixtral"),
}
NAMES = {family: names for names, families in _NAMES.items() for family in families}


class Fused(NamedTuple):
    """A projection of all experts of a layer.

    Attributes:
        tensor: [E, N, K], or [E, K, N]; N are the rows of all matrices of an expert.
        experts: its module: "model.layers.0.mlp.experts".
        matrices: the names of an expert's matrices: one for down, or gate and up.
        is_transposed: whether it is [E, K, N].
    """

    tensor: StoredTensor
    experts: str
    matrices: tuple[str, ...]
    is_transposed: bool

    def specs(self, expert: int) -> list[TensorSpec]:
        """Return the matrices [N, K] of an expert, as files hold them that have them single."""
        n, k = self.tensor.shape[1:][:: -1 if self.is_transposed else 1]
        shape = n // len(self.matrices), k
        return [
            TensorSpec(f"{self.experts}.{expert}.{name}.weight", self.tensor.dtype, shape)
            for name in self.matrices
        ]

    def read(self, expert: int) -> tuple[Tensor, ...]:
        """Return the values of `specs`, mapped from the file."""
        values = self.tensor.read(expert)
        return (values.T if self.is_transposed else values).chunk(len(self.matrices))


def experts_of(name: str) -> str | None:
    """Return the module of experts that a fused tensor is of, or None for other tensors."""
    found = _FUSED.match(name)
    return found and found[1]


def fused(checkpoint: Checkpoint, name: str) -> Fused:
    """Return the projection that a tensor with the name of one is.

    Raises:
        CheckpointError: the family is not known, its experts have biases, or the shapes are not
            those of experts whose matrices can be MXFP4.
    """
    tensor, experts = checkpoint.tensors[name], experts_of(name)
    place = f"{name} in {tensor.file}"
    text = checkpoint.config.get("text_config")
    family = (text if isinstance(text, dict) else checkpoint.config).get("model_type")
    names = NAMES.get(str(family))
    if names is None:
        raise CheckpointError(
            f"{place} holds all experts of a layer, and of {family} it is not known under which "
            "names a loader merges single ones: save the checkpoint again with transformers' "
            f"save_pretrained, if that writes them one by one; known are {', '.join(sorted(NAMES))}"
        )
    for part in ("gate_up_proj", "down_proj"):
        if f"{experts}.{part}" not in checkpoint.tensors:
            raise CheckpointError(f"{place} has no {experts}.{part} beside it: {AGAIN}")
        if bias := checkpoint.tensors.get(f"{experts}.{part}_bias"):
            raise CheckpointError(f"{bias.name} in {bias.file}: {family} has no biases: {AGAIN}")
    gate_up, down = (checkpoint.tensors[f"{experts}.{p}"] for p in ("gate_up_proj", "down_proj"))
    is_transposed = _is_transposed(gate_up, down)
    if is_transposed is None or tensor.dtype not in FLOATS:
        raise CheckpointError(
            f"{place} is {tensor.dtype} {list(tensor.shape)}: MXFP4 takes experts of float32, "
            "bfloat16 or float16, gate_up_proj [E, 2 I, K] and down_proj [E, K, I] or both "
            f"transposed, where I and K are multiples of {BLOCK}; skip its experts"
        )
    found = names[2:] if tensor is down else names[:2]
    return Fused(tensor, str(experts), found, is_transposed)


def _is_transposed(gate_up: StoredTensor, down: StoredTensor) -> bool | None:
    """Return whether experts are [E, K, N] instead of [E, N, K]; None if their shapes do not fit.

    At most one of them fits, because no size is 0.
    """
    if len(gate_up.shape) != 3 or len(down.shape) != 3 or gate_up.shape[0] != down.shape[0]:
        return None
    (_, a, b), (_, c, d) = gate_up.shape, down.shape
    for is_transposed, rows, k, n, i in ((False, a, b, c, d), (True, b, a, d, c)):
        if (rows, n) == (2 * i, k) and k and i and not (k % BLOCK or i % BLOCK):
            return is_transposed
    return None
