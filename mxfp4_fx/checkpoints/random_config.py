"""The sizes of a random GPT-OSS checkpoint, its configs and its byte-level tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mxfp4_fx.checkpoints.gpt_oss import MODEL_TYPE, not_converted_by_default, quantized_config
from mxfp4_fx.core.errors import CheckpointError
from mxfp4_fx.core.formats import BLOCK

# Special tokens, by the names of gpt-oss. Their ids follow 0 to 255, the bytes of a text.
BOS, PAD, EOS, CALL = "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|call|>"
CHAT = ("<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>")
TOKEN_IDS = {token: 256 + i for i, token in enumerate((BOS, PAD, EOS, CALL, *CHAT))}
TOKENIZER_SIZE = 256 + len(TOKEN_IDS)

CONTEXT_LENGTH = 131072


def _size(default: int, meaning: str) -> int:
    size: int = field(default=default, metadata={"help": meaning})
    return size


@dataclass(frozen=True)
class CheckpointShape:
    """The sizes of a GPT-OSS model; the defaults are gpt-oss-20b's, except `layers` and `vocab`.

    Raises:
        CheckpointError: GPT-OSS cannot have such a size; the message names the sizes it can have.
    """

    layers: int = _size(2, "decoder layers: sliding attention, full attention, and so on in turn")
    hidden: int = _size(2880, "width of the residual stream, a multiple of 32")
    intermediate: int = _size(2880, "width inside an expert, a multiple of 32")
    experts: int = _size(32, "experts in a layer")
    experts_per_token: int = _size(4, "experts that the router chooses for a token")
    heads: int = _size(64, "query heads, a multiple of the key-value heads")
    kv_heads: int = _size(8, "key-value heads")
    head_dim: int = _size(64, "width of a head, even")
    vocab: int = _size(512, f"rows of the embedding, {TOKENIZER_SIZE} or more")
    sliding_window: int = _size(128, "tokens that a sliding-attention layer sees")

    def __post_init__(self) -> None:
        require_sizes({size.name: getattr(self, size.name) for size in fields(self)})


def require_sizes(sizes: Mapping[str, int]) -> None:
    """Raise CheckpointError if a model cannot have these sizes, by the names of CheckpointShape."""
    kv_heads = max(sizes["kv_heads"], 1)
    block_rule = f"a multiple of {BLOCK}, the values in an MXFP4 block"
    experts = sizes["experts"]
    rules = (
        *((name, size < 1, "1 or more") for name, size in sizes.items()),
        ("hidden", sizes["hidden"] % BLOCK, block_rule),
        ("intermediate", sizes["intermediate"] % BLOCK, block_rule),
        ("experts_per_token", sizes["experts_per_token"] > experts, f"{experts} or less"),
        ("heads", sizes["heads"] % kv_heads, f"a multiple of {kv_heads}, the kv_heads"),
        ("head_dim", sizes["head_dim"] % 2, "even: rotary embeddings turn pairs of values"),
        ("vocab", sizes["vocab"] < TOKENIZER_SIZE, f"{TOKENIZER_SIZE} or more, for the tokenizer"),
    )
    for name, broken, rule in rules:
        if broken:
            raise CheckpointError(f"{name} is {sizes[name]}: it must be {rule}")


def as_json(content: dict[str, Any]) -> str:
    """Return the text of a JSON file."""
    return json.dumps(content, indent=2) + "\n"


def texts_of(shape: CheckpointShape) -> dict[str, str]:
    """Return file name -> text of the configs and the tokenizer."""
    config = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": TOKEN_IDS[EOS],
        "experts_per_token": shape.experts_per_token,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initial_context_length": 4096,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "layer_types": [f"{('sliding', 'full')[i % 2]}_attention" for i in range(shape.layers)],
        "max_position_embeddings": CONTEXT_LENGTH,
        "model_type": MODEL_TYPE,
        "num_attention_heads": shape.heads,
        "num_experts_per_tok": shape.experts_per_token,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "num_local_experts": shape.experts,
        "output_router_logits": False,
        "pad_token_id": TOKEN_IDS[PAD],
        "quantization_config": quantized_config(not_converted_by_default()),
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": shape.sliding_window,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": shape.vocab,
    }
    return {"config.json": as_json(config), **tokenizer_texts()}


def tokenizer_texts() -> dict[str, str]:
    """Return file name -> text of the tokenizer, and of what ``generate`` knows of its tokens.

    Raises:
        CheckpointError: ``tokenizers`` is not installed.
    """
    generation = {
        "bos_token_id": TOKEN_IDS[BOS],
        "do_sample": True,
        "eos_token_id": [TOKEN_IDS[EOS], TOKEN_IDS[PAD], TOKEN_IDS[CALL]],
        "pad_token_id": TOKEN_IDS[PAD],
    }
    tokenizer = {
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": CONTEXT_LENGTH,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        "generation_config.json": as_json(generation),
        "tokenizer_config.json": as_json(tokenizer),
        "tokenizer.json": _byte_tokenizer(),
    }


def _byte_tokenizer() -> str:
    """Return the tokenizer.json of a tokenizer whose ids 0 to 255 are the bytes of UTF-8 text."""
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    except ImportError as error:
        raise CheckpointError(
            "a checkpoint's tokenizer is made with tokenizers: pip install tokenizers"
        ) from error
    # ByteLevel maps a printable byte to itself, and the n-th other byte to character 256 + n.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable}
    vocab |= {chr(256 + n): byte for n, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(TOKEN_IDS))
    text: str = tokenizer.to_str(pretty=True)
    return text
