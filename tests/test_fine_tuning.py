"""Fine-tuning of compiled packed models: PEFT's adapters, and transformers' Trainer.

Losses are compared with those of the uncompiled model, and both with a dense model in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_packed
from combinations import exhaustive
from models import model, pack, tokens
from oracle import assert_as_accurate
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoTokenizer, Trainer, TrainingArguments

import mxfp4_fx

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
finetune_lora = pytest.importorskip("examples.finetune_lora")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
OPTIONS = {"inner": "aot_eager", "strict": True}
EXAMPLES = [{"input_ids": row, "labels": row} for row in tokens(batch=8)]


def with_adapters(base: nn.Module, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Give a model adapters whose factors do not depend on the model's dtype."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": []}
    wrapped = peft.get_peft_model(base, peft.LoraConfig(**{**given, **changes}))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return wrapped.to(dtype) if dtype == torch.float64 else wrapped


def packed(**changes: Any) -> Any:
    return with_adapters(pack(model(num_hidden_layers=1)), **changes)


def exact(**changes: Any) -> Any:
    return with_adapters(
        model(torch.float64, "batched_mm", num_hidden_layers=1), torch.float64, **changes
    )


def losses(made: Any, steps: int = 3) -> torch.Tensor:
    """Train on one batch and return each step's loss."""
    trained = [p for p in made.parameters() if p.requires_grad]
    optimizer, found = torch.optim.SGD(trained, lr=0.1), []
    for _ in range(steps):
        loss = made(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize(
    ("changes", "graphs"),
    [
        ({"target_modules": ["q_proj"], "target_parameters": EXPERTS}, 1),
        exhaustive(
            {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "use_rslora": True}, 1
        ),
        exhaustive({"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}, 1),
        exhaustive({"target_parameters": EXPERTS, "modules_to_save": ["router"]}, 1),
    ],
)
def test_one_graph_trains_as_the_uncompiled_model_does(changes: Any, graphs: int) -> None:
    uncompiled, compiled = packed(**changes), packed(**changes)
    compiled.compile(backend="mxfp4", options=OPTIONS)
    assert_as_accurate(losses(compiled), losses(uncompiled), losses(exact(**changes)).double())
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def as_a_whole(whole: nn.Module, options: Any) -> None:
    whole.compile(backend="mxfp4", options=options)


@pytest.mark.parametrize(
    ("layers", "compile", "mode"),
    [
        (1, mxfp4_fx.compile, torch.inference_mode),
        exhaustive(1, mxfp4_fx.compile, torch.no_grad),
        exhaustive(2, as_a_whole, torch.inference_mode),  # in regions, which one layer has not
        exhaustive(2, as_a_whole, torch.no_grad),
    ],
)
def test_adapters_of_a_model_that_ran_without_gradients(
    layers: int, compile: Any, mode: Any
) -> None:
    """What was compiled for that serves no training, nor do tensors that it made."""
    changes = {"target_modules": ["q_proj"], "target_parameters": EXPERTS}
    base = pack(model(num_hidden_layers=layers))
    compile(base, options={"inner": "eager", "strict": True})
    with mode():
        base(tokens(), use_cache=False)
    ours = losses(with_adapters(base, **changes), 2)
    uncompiled = with_adapters(pack(model(num_hidden_layers=layers)), **changes)
    truth = with_adapters(
        model(torch.float64, "batched_mm", num_hidden_layers=layers), torch.float64, **changes
    )
    assert_as_accurate(ours, losses(uncompiled, 2), losses(truth, 2).double())


def logits(made: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = made(tokens(), use_cache=False).logits
    return found


def give_trained(exact: Any, made: Any) -> None:
    """Give a float64 model the weights that PEFT trains of another."""
    found = dict(made.named_parameters())
    for name, parameter in exact.named_parameters():
        if "lora" in name or "modules_to_save" in name:
            parameter.data = found[name].detach().double()


@pytest.mark.exhaustive
def test_a_trained_adapter_is_saved_loaded_and_merged(tmp_path: Path) -> None:
    changes = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    made = packed(**changes)
    made.compile(backend="mxfp4", options=OPTIONS)
    losses(made)
    expected, truth = logits(made), exact(**changes)
    give_trained(truth, made)
    made.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(pack(model(num_hidden_layers=1)), tmp_path)
    loaded.compile(backend="mxfp4", options=OPTIONS)
    assert torch.equal(logits(loaded), expected)
    merged = made.merge_and_unload()
    merged.compile(backend="mxfp4", options=OPTIONS)
    # Attention has one matrix where it had a matrix and two factors: float32 rounds elsewhere.
    assert_as_accurate(logits(merged), expected, logits(truth))
    assert not any("lora" in name for name, _ in merged.named_parameters())


@pytest.mark.exhaustive
def test_adapters_are_switched_while_compiled() -> None:
    """Of a whole model; each state is a graph, and coming back to it is none."""
    changes = {"target_modules": ["q_proj", "v_proj"], "target_parameters": EXPERTS}
    made, plain = packed(**changes), pack(model(num_hidden_layers=1))
    made.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=8, **changes))
    for name, parameter in made.named_parameters():
        if "second" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    truth = exact(**changes)
    truth.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=8, **changes))
    give_trained(truth, made)
    expected = {}
    for name in ("default", "second"):
        made.set_adapter(name)
        truth.set_adapter(name)
        expected[name] = logits(made), logits(truth)
    with truth.disable_adapter():
        without = logits(plain), logits(truth)
    made.compile(backend="mxfp4", options={**OPTIONS, "kernels": "reference"})
    for _ in range(2):
        for name, uncompiled in expected.items():
            made.set_adapter(name)
            assert_as_accurate(logits(made), *uncompiled)
        with made.disable_adapter():
            assert_as_accurate(logits(made), *without)
        assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]
    assert not torch.equal(expected["default"][0], expected["second"][0])


def trained(trainer: Trainer, **how: Any) -> list[torch.Tensor]:
    """Train, and return the factors. Losses in the log are rounded."""
    trainer.train(**how)
    return [p.detach() for name, p in trainer.model.named_parameters() if "lora_" in name]


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    given = {"max_steps": 4, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 2}
    given |= {"optim": "adamw_torch_fused", "adam_epsilon": 1e-3, "learning_rate": 1e-2}
    given |= {"lr_scheduler_type": "constant"}
    given |= {"use_cpu": True, "report_to": [], "output_dir": str(folder), "disable_tqdm": True}
    return {**given, **changes}


def trainer_of(made: Any, folder: Path, **changes: Any) -> Trainer:
    given = TrainingArguments(**arguments(folder, **changes))
    return Trainer(model=made, args=given, train_dataset=EXAMPLES)


def compiled_trainer(made: Any, folder: Path, **changes: Any) -> Trainer:
    """The recipe of docs/fine-tuning.md."""
    base = made.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.disable_input_require_grads()
    trainer = trainer_of(made, folder, **changes)
    trainer.model.compile(backend="mxfp4", options=OPTIONS)
    return trainer


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.exhaustive
@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_with_checkpointing_resumes(bf16: bool, tmp_path: Path) -> None:
    changes = {"target_modules": ["q_proj"], "target_parameters": EXPERTS}
    expected = trained(trainer_of(packed(**changes), tmp_path / "expected", bf16=bf16))
    truth = trained(trainer_of(exact(**changes), tmp_path / "exact"))
    trained(compiled_trainer(packed(**changes), tmp_path / "ours", max_steps=2, bf16=bf16))
    second = compiled_trainer(packed(**changes), tmp_path / "ours", bf16=bf16)
    resumed = trained(second, resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    assert not counters["graph_break"]
    for actual, reference, exactly in zip(resumed, expected, truth, strict=True):
        assert_as_accurate(actual, reference, exactly)


def as_a_whole(made: nn.Module) -> None:
    made.compile(backend="mxfp4", options=OPTIONS)


def by_layers(made: nn.Module) -> None:
    mxfp4_fx.compile(made, options=OPTIONS)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("error::mxfp4_fx.errors.WholeModelWarning")
@pytest.mark.parametrize(("compiled", "checkpointing"), [(as_a_whole, False), (by_layers, True)])
def test_sft_trainer(compiled: Any, checkpointing: bool, tmp_path: Path) -> None:
    """TRL's trainer on text, with its auxiliary loss; also with its own checkpointing."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    write_packed(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", local_files_only=True)
    found = []
    for compile_it in (lambda _: None, compiled):
        base = mxfp4_fx.from_pretrained(tmp_path / "model", dtype=torch.float32)
        made = with_adapters(base, target_modules=["q_proj"], target_parameters=EXPERTS)
        given = arguments(tmp_path / "out", gradient_checkpointing=checkpointing, max_steps=2)
        trainer = trl.SFTTrainer(
            model=made,
            args=trl.SFTConfig(**given, bf16=False, max_length=16),
            train_dataset=datasets.Dataset.from_dict({"text": ["a mixture of experts"] * 4}),
            processing_class=tokenizer,
        )
        compile_it(trainer.model)
        flag = {"skip_fwd_side_effects_in_bwd_under_checkpoint": checkpointing}
        with torch._dynamo.config.patch(**flag):
            trained(trainer)
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        found.append([(entry["loss"], entry["aux_loss"]) for entry in log])
    assert len(found[0]) == 2
    # The log rounds losses to four significant digits.
    assert found[1] == found[0]


def run_example(folder: Path, *argv: str) -> None:
    sizes = ["--layers", "1", "--size", "32", "--experts", "4", "--tokens", "8", "--steps", "3"]
    given = ["--checkpoint", str(folder / "tiny"), *sizes, "--inner", "aot_eager", *argv]
    assert finetune_lora.main(given) == 0


@pytest.mark.parametrize("way", ["packed", exhaustive("bfloat16")])
def test_the_example_trains(way: str, tmp_path: Path, capsys: Any) -> None:
    run_example(tmp_path, "--only", way)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["losses"][2] < told["losses"][0]
    assert told["seconds"] > 0
    assert told["peak"] > told["weights"] > 0


def test_the_example_prints_a_table(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each way is a process of its own, which takes seconds to start."""
    told = {"seconds": 2.0, "weights": 2**30, "peak": 3 * 2**30, "losses": [2.0, 1.5]}
    monkeypatch.setattr(finetune_lora, "in_a_process", lambda way, argv: told)
    run_example(tmp_path)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["packed", "bfloat16"]
    assert rows[0][1:] == ["2.00", "1.00", "GiB", "3.00", "GiB", "2.0000,", "1.5000"]
