"""Tensors that a GPT-OSS checkpoint should not have: which tool wrote them, and the remedy."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from mxfp4_fx.checkpoints import gpt_oss
from mxfp4_fx.checkpoints.gpt_oss import Form
from mxfp4_fx.core.skip import WRAPPERS

_FORMS: tuple[Form, Form] = ("packed", "dense")
# Part of a name -> the tool that adds it. Parts in WRAPPERS may be anywhere, others at the start.
_MAKERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "module": "DistributedDataParallel",
    "base_model.model": "PEFT",
}
_EMBEDDING = "embed_tokens.weight"
_ADAPTER = re.compile(r"\.(?:lora_|modules_to_save\.|original_module\.)")
_ONE_EXPERT = re.compile(r"\.experts\.(?:\w+\.)?\d+\.")
_TRANSFORMERS = "save them in the layout of transformers"


def diagnosis(names: Collection[str], missing: Sequence[str]) -> str | None:
    """Find out from a checkpoint's names why it lacks tensors.

    Args:
        names: the names of all its tensors.
        missing: the names of the tensors that it lacks.

    Returns:
        The cause and a remedy, as the end of a sentence that has named the missing tensors; None if
        the cause is unknown.
    """
    if any(".base_layer." in name for name in names):
        return (
            "the checkpoint was saved from a PEFT model whose adapter is not merged: save what "
            "merge_and_unload() returns"
        )
    if found := _wrappers(names, missing):
        parts = ", ".join(map(_with_maker, found))
        mapping = ", ".join(f'r"{pattern}": ""' for pattern in found)
        return (
            f"the names in the files have the extra part {parts}: save the model that was wrapped, "
            f"or pass key_mapping={{{mapping}}} to mxfp4_fx.from_pretrained"
        )
    if single := next((name for name in names if _ONE_EXPERT.search(name)), None):
        return (
            f"the files hold experts one by one ({single}): {_TRANSFORMERS}, which has one tensor "
            "[experts, in, out] for all experts of a layer, with gate in the even columns of "
            "gate_up_proj and up in the odd"
        )
    if any(re.match(r"block\.\d+\.", name) for name in names):
        return (
            "the checkpoint is in OpenAI's own layout, not in that of transformers: a download has "
            "the latter in the folder above"
        )
    if any(name.rpartition(".")[2].startswith(("_flat_param", "flat_param")) for name in names):
        return "the parameters are FSDP's flat ones: save a full state dict"
    if all(re.search(r"\.self_attn\.\w_proj\.bias$", name) for name in missing):
        return (
            'if attention has no biases, config.json ought to say "attention_bias": false; else '
            "copy or download the checkpoint again"
        )
    if list(missing) == ["lm_head.weight"]:
        return (
            'if the head is the embedding, config.json ought to say "tie_word_embeddings": true; '
            "else save the model again with its head, or copy or download the checkpoint again"
        )
    return None


def contradicts(name: str, prefix: str) -> bool:
    """Return whether a GPT-OSS of another config has a tensor of that name.

    If such a tensor is not expected, the config belongs to another model. A tensor of any other
    name belongs to no GPT-OSS.
    """
    found = re.match(rf"{re.escape(prefix)}layers\.(\d+)\.", name)
    layer = int(found[1]) if found else 0
    return any(
        name in gpt_oss.tensors(prefix, {layer: form}, biases=True, head=True) for form in _FORMS
    )


def is_an_adapters(name: str) -> bool:
    """Return whether a tensor's name is that of a PEFT adapter's tensor."""
    return _ADAPTER.search(name) is not None


def described(names: Sequence[str]) -> str:
    """Return what messages say of tensors that no GPT-OSS has and that the loader leaves out."""
    if any(map(is_an_adapters, names)):
        return (
            "an adapter's among them: the model is loaded without it, which "
            "peft.PeftModel.from_pretrained adds"
        )
    return "the model is loaded without them, as transformers does it"


def _wrappers(names: Collection[str], missing: Sequence[str]) -> list[str]:
    """Return patterns whose removal from `names` yields more than half of the missing names."""
    patterns = []
    for embedding in (name for name in names if name.endswith(_EMBEDDING)):
        if before := embedding.removesuffix(_EMBEDDING).removesuffix("model."):
            patterns.append("^" + re.escape(before))
    for part in WRAPPERS:
        if any(f".{part}." in _bare(name, patterns) for name in names):
            patterns.append(rf"{part}\.")
    found = {_bare(name, patterns).removeprefix("model.") for name in names}
    helped = sum(name.removeprefix("model.") in found for name in missing)
    return patterns if helped * 2 > len(missing) else []


def _bare(name: str, patterns: Sequence[str]) -> str:
    for pattern in patterns:
        name = re.sub(pattern, "", name)
    return name


def _with_maker(pattern: str) -> str:
    parts = pattern.lstrip("^").replace("\\", "")
    makers = [maker for part, maker in _MAKERS.items() if f".{part}." in f".{parts}"]
    return f"{parts!r} (from {' and '.join(makers)})" if makers else repr(parts)
