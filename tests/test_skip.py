"""``skip``: which modules a pattern names, wherever it is given."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from mxfp4_fx.core.errors import OptionError
from mxfp4_fx.core.skip import Skip, not_converted

# Twelve layers: "1" is the beginning of "10" and "11".
EXPERTS = [f"model.layers.{layer}.mlp.experts" for layer in range(12)]
ALL = set(range(12))

# pattern -> the layers whose experts it names
PATTERNS = {
    # a name: the module and all that is in it
    "model.layers.1.mlp.experts": {1},
    "model.layers.1.mlp": {1},
    "model.layers.1": {1},
    "model": ALL,
    # parts of a name, from dot to dot
    "layers.1": {1},
    "mlp.experts": ALL,
    "experts": ALL,
    "1.mlp.experts": {1},
    "10": {10},
    ".mlp.experts": ALL,
    "model.layers.1.": {1},
    # as in a shell
    "*.layers.0.*": {0},
    "*.layers.1.*": {1},
    "*.layers.1": {1},
    "model.layers.1.*": {1},
    "model.layers.*": ALL,
    "model.layers.?": set(range(10)),
    "model.layers.1?": {10, 11},
    "model.layers.[02].mlp": {0, 2},
    "model.layers.[!02]": set(range(10)) - {0, 2},
    "*": ALL,
    "*.experts": ALL,
    ".*": ALL,
    # regular expressions
    "model.layers.(1|7)": {1, 7},
    "layers.(1|7)": {1, 7},
    r"model\.layers\.1": {1},
    r"model\.layers\.1\.": {1},
    r"^model.layers.\d$": set(),
    r"model.layers.\d": set(range(10)),
    r"layers\.\d{2}": {10, 11},
    "model.layers.1|lm_head": {1},
    "model.layers.[0-9]+.mlp": ALL,
    # no experts
    "": set(),
    ".": set(),
    "erts": set(),
    "model.layers.1.m": set(),
    "ayers.1": set(),
    "layers.12": set(),
    "Model.layers.1": set(),
    "model.layers.1.mlp.experts.down_proj": set(),
    "model.layers.*.self_attn": set(),
    "model.layers.*.mlp.router": set(),
    "model.embed_tokens": set(),
    "lm_head": set(),
    "*.layers.0.self_attn.*": set(),
    "model.layers.[": set(),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_a_pattern_names(pattern: str) -> None:
    skip = Skip.of(pattern)
    assert {i for i, name in enumerate(EXPERTS) if skip.names(name)} == PATTERNS[pattern]
    assert skip.unused(EXPERTS) == (() if PATTERNS[pattern] else (pattern,))


WRAPPED = [
    "_orig_mod.model.layers.1.mlp.experts",
    "module.model.layers.1.mlp.experts",
    "module._orig_mod.model.layers.1.mlp.experts",
    "base_model.model.model.layers.1.mlp.experts",
    "model.layers.1._orig_mod.mlp.experts",
    "model.layers._orig_mod.1.mlp.experts",
    "_fsdp_wrapped_module.model.layers.1._fsdp_wrapped_module.mlp.experts",
    "model.layers.1._checkpoint_wrapped_module.mlp.experts",
    "layers.1.mlp.experts",  # of a base model
]


@pytest.mark.parametrize("module", WRAPPED)
def test_a_name_that_wrappers_have_changed(module: str) -> None:
    for pattern in ("model.layers.1", "*.layers.1.*", "model.layers.(1|7)", module):
        assert Skip.of(pattern).names(module), pattern
    for pattern in ("model.layers.10", "*.layers.0.*", "model.layers.(2|7)"):
        assert not Skip.of(pattern).names(module), pattern


def test_several_patterns() -> None:
    skip = Skip(("model.layers.1", "*.layers.3.*", "lm_head"))
    assert [i for i, name in enumerate(EXPERTS) if skip.names(name)] == [1, 3]
    assert skip.unused(EXPERTS) == ("lm_head",)
    assert not any(map(Skip().names, EXPERTS))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("model.layer.1", r"skip='model.layer.1' names no experts: .* mean 'model.layers.1'\?"),
        ("model.layers.3.mlp.expert", r"mean 'model.layers.3.mlp.experts'\?"),
        ("lm_head", r"names no experts: theirs are names like model.layers.0.mlp.experts$"),
    ],
)
def test_a_pattern_that_names_nothing_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Skip(("model.layers.1", pattern)).require_used(EXPERTS)
    Skip(("model.layers.1",)).require_used(EXPERTS)


@pytest.mark.parametrize("patterns", [5, [5], ["lm_head", None]], ids=str)
def test_patterns_that_are_no_text(patterns: Any) -> None:
    with pytest.raises(OptionError, match=r"skip=.* is no list of names of modules"):
        Skip.of(patterns)


@pytest.mark.parametrize("pattern", ["(1", "model.layers.+*", "\\"])
def test_a_pattern_that_is_no_expression(pattern: str) -> None:
    with pytest.raises(OptionError, match=r"is no regular expression .*: name a module"):
        Skip.of(pattern)


@pytest.mark.parametrize(
    "entry", [e for e in PATTERNS if not e.startswith(("*", "model.layers.["))]
)
def test_entries_of_a_checkpoints_config_mean_what_they_mean_to_transformers(entry: str) -> None:
    for name in EXPERTS:
        assert not_converted(entry, name) == (not should_convert_module(name, [entry]))
