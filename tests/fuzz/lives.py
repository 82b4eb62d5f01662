"""Lives of models: random sequences of what people do to them, each step followed by a look.

    PYTHONPATH=tests python -m fuzz.lives --count 100 --seed 0

A life starts with a few small MLPs, dense and packed. Each step changes, compiles, frees, saves or
loads one of them, in one of the ways that torch has for it. After each, every compiled module gives
what its present weights mean in MXFP4, and every uncompiled one what they are, within the rounding
of float32 (``oracle.py``); or a `Mxfp4Error` says why not, and the life goes on. A life that fails
is printed with its seed and its steps: ``--seed`` of it with ``--count 1`` repeats it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import io
import random
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from models import compile_with, mlp, pack
from oracle import Bounded, assert_within, experts, route
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import mxfp4_fx
from mxfp4_fx.core.errors import Mxfp4Error
from mxfp4_fx.core.formats import dequantize, quantize
from mxfp4_fx.weights.freed import is_freed

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 4}
TOP_K = 2
PROJECTIONS = ("gate_up_proj", "down_proj")
OPTIONS: tuple[dict[str, Any], ...] = (
    *({}, {}, {}),
    *({"kernels": "reference"}, {"kernels": "reference"}),
    {"free_weights": True},
    {"kernels": "pytorch", "free_weights": True},
    {"skip": ["*"]},
)
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "for-loop SGD": lambda ps: SGD(ps, lr=0.3, foreach=False),
    "foreach SGD": lambda ps: SGD(ps, lr=0.3, momentum=0.5, foreach=True),
    "fused SGD": lambda ps: SGD(ps, lr=0.3, fused=True),
    "fused AdamW": lambda ps: AdamW(ps, lr=0.05, fused=True),
}
# A write that torch does not count; whoever does it calls refresh.
UNCOUNTED: dict[str, Callable[[Tensor], Any]] = {
    "data.neg_": lambda p: p.data.neg_(),
    "numpy": lambda p: p.detach().numpy().__imul__(-1),
    "DLPack": lambda p: torch.from_dlpack(p.detach()).neg_(),
}


class Subject:
    """A module, its compiled forms, and what its weights are by what was done to it."""

    def __init__(self, seed: int, is_packed: bool, form: str) -> None:
        module = mlp(form=form, seed=seed, num_experts_per_tok=TOP_K, **SIZES)
        self.module: Any = pack(module) if is_packed else module
        self.is_packed = is_packed
        self.compiled: list[tuple[dict[str, Any], Callable[..., Any]]] = []
        # Of weights that are freed, these are the values that they had.
        self.known: dict[str, Tensor] = {}
        self.look()

    def look(self) -> None:
        """Learn what the weights are, where that can be seen."""
        for name, parameter in self.module.named_parameters():
            if not is_freed(parameter):
                self.known[name] = parameter.detach().clone()

    def values(self, name: str, in_mxfp4: bool) -> tuple[Tensor, Tensor]:
        """An expert matrix [E, N, K] and its bias, in float64."""
        bias = self.known[f"experts.{name}_bias"].double()
        if self.is_packed:
            bytes_ = (self.known[f"experts.{name}_{part}"] for part in ("blocks", "scales"))
            return dequantize(*bytes_, torch.float32).double(), bias
        weight = self.known[f"experts.{name}"].transpose(1, 2)
        return (in_grid(weight) if in_mxfp4 else weight).double(), bias

    def expected(self, x: Tensor, in_mxfp4: bool) -> Bounded:
        known = self.known
        logits = nn.functional.linear(x[0], known["router.weight"], known["router.bias"])
        pairs = [self.values(name, in_mxfp4) for name in PROJECTIONS]
        return experts(x[0], *route(logits, TOP_K), *pairs, 1.702, 7.0, torch.float32)

    def experts(self) -> dict[str, nn.Parameter]:
        """The parameters that are swizzled."""
        ends = ("proj", "proj_blocks", "proj_scales")
        return {n: p for n, p in self.module.named_parameters() if n.endswith(ends)}

    @property
    def is_freed(self) -> bool:
        return any(map(is_freed, self.experts().values()))


def in_grid(weight: Tensor) -> Tensor:
    """The values that MXFP4 holds of a weight [E, N, K]."""
    return dequantize(*quantize(weight), torch.float32)


class Life:
    """One sequence of steps.

    Attributes:
        log: the steps so far, in words.
        errors: how many of our own errors were met.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.log: list[str] = []
        self.errors = 0
        self.subjects = [self.born() for _ in range(2)]
        self.steps = [
            *([self.compile] * 2),
            *([self.train, self.write, self.assign] * 3),
            *([self.load, self.restore] * 2),
            *(
                self.free,
                self.save,
                self.convert,
                self.forget,
                self.tie,
                self.swap,
                self.write_uncounted,
            ),
            *(self.threads, self.die, self.replace),
        ]

    def born(self) -> Subject:
        is_packed = self.random.random() < 0.3
        form = self.random.choice(("grouped_mm", "batched_mm"))
        self.log.append(f"a {'packed' if is_packed else 'dense ' + form} MLP")
        return Subject(self.number(), is_packed, form)

    def number(self) -> int:
        return self.random.randrange(1 << 30)

    def live(self, steps: int) -> None:
        for subject in self.subjects:
            self.compile(subject)
        self.check()
        for _ in range(steps):
            step = self.random.choice(self.steps)
            at = self.random.randrange(len(self.subjects))
            self.log.append(f"{step.__name__} of {at}")
            step(self.subjects[at])
            for subject in self.subjects:
                subject.look()
            if self.random.random() < 0.8:  # else two changes come between two calls
                self.check()
        self.check()

    def check(self) -> None:
        """Call everything that there is."""
        generator = torch.Generator().manual_seed(self.number())
        x = torch.randn((1, 5, SIZES["hidden_size"]), generator=generator)
        for at, subject in enumerate(self.subjects):
            for options, compiled in self.random.sample(subject.compiled, len(subject.compiled)):
                self.log.append(f"  {at} compiled with {options}")
                # Dense experts that nobody rewrites need their values.
                may_fail = "skip" in options and subject.is_freed
                self.call(subject, compiled, x, "skip" not in options, may_fail)
            if self.random.random() < 0.3:
                self.log.append(f"  {at} uncompiled")
                self.call(subject, subject.module, x, False, subject.is_freed)

    def call(
        self, subject: Subject, run: Callable[..., Any], x: Tensor, in_mxfp4: bool, may_fail: bool
    ) -> None:
        expected = subject.expected(x, in_mxfp4)
        try:
            with self.random.choice((torch.no_grad, torch.inference_mode))():
                out = run(x)[0]
        except Exception as error:
            if not (may_fail and is_ours(error)):
                raise
            self.errors += 1
            self.log.append(f"    {type(error).__name__}")
            return
        assert_within(out[0], expected)

    # Steps. Each leaves the module with weights that can be computed with.

    def compile(self, subject: Subject) -> None:
        options = self.random.choice(OPTIONS)
        self.log.append(f"  with {options}")
        subject.compiled.append((options, compile_with(subject.module, options=options)))
        del subject.compiled[:-3]

    def train(self, subject: Subject) -> None:
        """A step of an optimizer; the gradients are random."""
        name = self.random.choice(list(OPTIMIZERS))
        only = self.random.choice(("router", "", ""))
        trained = [
            p
            for n, p in subject.module.named_parameters()
            # Lists of tensors with a lazy sign are more than torch's own kernels take.
            if only in n and p.is_floating_point() and not is_freed(p) and not p.is_neg()
        ]
        if not trained:
            return
        self.log.append(f"  {name} of {only or 'all'}")
        generator = torch.Generator().manual_seed(self.number())
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 0.1
        OPTIMIZERS[name](trained).step()
        for parameter in trained:
            parameter.grad = None

    def some_weight(self, subject: Subject) -> tuple[str, nn.Parameter]:
        # Down more often: it is square, and can be transposed.
        found = sorted(subject.experts().items())
        name, weight = self.random.choice([*found, *found[: len(found) // 2]])
        self.log.append(f"  {name}{', which is freed' if is_freed(weight) else ''}")
        return name, weight

    def new_values(self, weight: Tensor) -> Tensor:
        """Of the shape and dtype of a weight; scale bytes are moderate."""
        generator = torch.Generator().manual_seed(self.number())
        if weight.dtype == torch.uint8:
            low, high = (119, 124) if weight.ndim == 3 else (0, 256)
            shape = tuple(weight.shape)
            return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)
        return torch.randn(weight.shape, generator=generator) * 0.1

    def write(self, subject: Subject) -> None:
        """In place, counted by torch."""
        _, weight = self.some_weight(subject)
        new = self.new_values(weight)
        ways: dict[str, Callable[[], Any]] = {"copy_": lambda: weight.copy_(new)}
        if not is_freed(weight):
            ways["a view's copy_"] = lambda: weight[1].copy_(new[1])
            if not weight.is_neg():
                ways["_foreach_copy_"] = lambda: torch._foreach_copy_([weight], [new])
            ways["set_"] = lambda: weight.set_(new)
            ways["detach().copy_"] = lambda: weight.detach().copy_(new)
        way = self.random.choice(list(ways))
        self.log.append(f"  by {way}")
        with torch.no_grad():
            ways[way]()

    def write_uncounted(self, subject: Subject) -> None:
        if subject.is_packed or subject.is_freed:
            return
        _, weight = self.some_weight(subject)
        way = self.random.choice(list(UNCOUNTED))
        self.log.append(f"  by {way}, and refresh")
        UNCOUNTED[way](weight)
        mxfp4_fx.refresh(subject.module)

    def assign(self, subject: Subject) -> None:
        """``p.data = t``, of several kinds."""
        name, weight = self.some_weight(subject)
        new = self.new_values(weight)
        kinds: dict[str, Callable[[], Any]] = {
            "new": lambda: new,
            "part of something": lambda: torch.cat([new, new])[1 : 1 + new.shape[0]],
        }
        if not is_freed(weight):

            def through_nothing() -> Tensor:
                """At the old address, likely."""
                shape, dtype = weight.shape, weight.dtype
                weight.data = torch.empty(0, dtype=dtype)
                return torch.empty(shape, dtype=dtype).copy_(new)

            kinds["new, through nothing"] = through_nothing
            if name.endswith("down_proj"):
                kinds["transposed"] = lambda: weight.data.transpose(1, 2)
                kinds["negative by a bit"] = lambda: torch._neg_view(weight.data)
        kind = self.random.choice(list(kinds))
        self.log.append(f"  {kind}")
        weight.data = kinds[kind]()

    def replace(self, subject: Subject) -> None:
        """Another parameter; maybe of the memory of the old one."""
        name, weight = self.some_weight(subject)
        same = not is_freed(weight) and self.random.random() < 0.5
        if same:
            with torch.no_grad():
                weight.copy_(self.new_values(weight))
        new = weight.data if same else self.new_values(weight)
        self.log.append("  of the same memory" if same else "  of new memory")
        del weight
        setattr(subject.module.experts, name.rpartition(".")[2], nn.Parameter(new, False))

    def swap(self, subject: Subject) -> None:
        name, weight = self.some_weight(subject)
        if is_freed(weight):
            return
        other = nn.Parameter(self.new_values(weight), requires_grad=weight.requires_grad)
        del name
        torch.utils.swap_tensors(weight, other)

    def load(self, subject: Subject) -> None:
        """From another module's state, or its own."""
        state = subject.module.state_dict()
        own, assign = self.random.random() < 0.3, self.random.random() < 0.3
        if not own:
            state = {name: self.new_values(value) for name, value in state.items()}
        self.log.append(f"  {'its own' if own else 'others'}, assign={assign}")
        expected = self.as_saved(subject) if own else state
        subject.module.load_state_dict(copy.copy(state), assign=assign)
        self.must_be(subject, expected)

    def save(self, subject: Subject) -> None:
        file = io.BytesIO()
        torch.save(subject.module.state_dict(), file)
        file.seek(0)
        for name, value in torch.load(file, weights_only=True).items():
            assert torch.equal(value, self.as_saved(subject)[name]), f"{name} was saved otherwise"

    def free(self, subject: Subject) -> None:
        options = {"free_weights": True}
        subject.compiled.append((options, compile_with(subject.module, options=options)))
        del subject.compiled[:-3]

    def restore(self, subject: Subject) -> None:
        expected = self.as_saved(subject)
        mxfp4_fx.restore(subject.module)
        self.must_be(subject, expected)

    def convert(self, subject: Subject) -> None:
        expected = self.as_saved(subject)
        if self.random.random() < 0.5:
            self.log.append("  to where and what it is")
            subject.module.to("cpu").float()
            return
        self.log.append("  to bfloat16 and back")
        subject.module.to(torch.bfloat16).to(torch.float32)
        self.must_be(
            subject,
            {
                name: value.bfloat16().float() if value.is_floating_point() else value
                for name, value in expected.items()
            },
        )

    def forget(self, subject: Subject) -> None:
        mxfp4_fx.forget(subject.module)

    def tie(self, subject: Subject) -> None:
        """Its experts become another's, or a parameter does."""
        other = self.random.choice(self.subjects)
        if other is subject or other.is_packed != subject.is_packed:
            return
        if self.random.random() < 0.5:
            self.log.append("  the experts")
            subject.module.experts = other.module.experts
        else:
            name, weight = self.some_weight(other)
            setattr(subject.module.experts, name.rpartition(".")[2], weight)
        for name, value in other.known.items():
            if (
                dict(subject.module.named_parameters())[name]
                is dict(other.module.named_parameters())[name]
            ):
                subject.known[name] = value

    def threads(self, subject: Subject) -> None:
        """Several call it at once."""
        x = torch.randn((1, 5, SIZES["hidden_size"]))
        expected, failures = subject.expected(x, True), []
        forms = [run for options, run in subject.compiled if "skip" not in options]

        def call(run: Callable[..., Any]) -> None:
            try:
                with torch.no_grad(), no_limits():
                    assert_within(run(x)[0][0], expected)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=call, args=(run,)) for run in forms * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def die(self, subject: Subject) -> None:
        at = self.subjects.index(subject)
        del subject
        self.subjects[at] = self.born()
        gc.collect()
        self.compile(self.subjects[at])

    def as_saved(self, subject: Subject) -> dict[str, Tensor]:
        """What can be had of the weights: of freed dense ones the values that MXFP4 holds."""
        return {
            name: in_grid(subject.known[name].transpose(1, 2)).transpose(1, 2)
            if is_freed(parameter) and not subject.is_packed
            else subject.known[name]
            for name, parameter in subject.module.named_parameters()
        }

    def must_be(self, subject: Subject, expected: dict[str, Tensor]) -> None:
        for name, parameter in subject.module.named_parameters():
            if is_freed(parameter):
                continue
            assert torch.equal(parameter, expected[name]), f"{name} has other values"


def no_limits() -> Any:
    """Let Dynamo compile as often as a life takes; configurations are a thread's own."""
    return torch._dynamo.config.patch(recompile_limit=128, accumulated_recompile_limit=1024)


def is_ours(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, Mxfp4Error) or "FreedWeightError" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def run(seed: int, steps: int = 12) -> Life:
    """Live one life; what goes wrong is raised, with the seed and the steps in its notes."""
    torch.compiler.reset()
    torch.manual_seed(seed)
    life = Life(seed)
    with no_limits(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            life.live(steps)
        except BaseException as error:
            told = "\n".join(life.log)
            raise AssertionError(f"the life with --seed {seed} --steps {steps}:\n{told}") from error
    return life


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=20, help="how many lives")
    parser.add_argument("--seed", type=int, default=0, help="of the first; each has the next one")
    parser.add_argument("--steps", type=int, default=12, help="of each")
    given = parser.parse_args(argv)
    failed = 0
    for seed in range(given.seed, given.seed + given.count):
        try:
            life = run(seed, given.steps)
            print(f"{seed}: {life.errors} errors of ours", flush=True)
        except AssertionError as error:
            failed += 1
            print(f"{error}\n{''.join(traceback.format_exception(error.__cause__))}", flush=True)
    print(f"{failed} of {given.count} failed")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
