"""What is run with each version: some behaviours, and the tests that show them.

``python -m versions.behaviours PACKAGE VERSION FILE BEHAVIOUR ...`` runs some of a package in its
process, which must find that version, and writes their outcomes as JSON.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
PASSES = "passes"

# A behaviour -> the beginnings of its tests' names.
MODELS = {
    "whole models": ("test_forms.py::test_a_whole_model[",),
    "each form in each dtype": ("test_forms.py::TestForms::test_an_mlp[",),
    "`strict`": ("test_backend.py::TestMisses::",),
    "gradients": ("test_forms.py::test_gradients_through_frozen_experts[grouped_mm",),
    "loading": ("test_loading.py::test_uncompiled_logits[", "test_packed.py::test_every_layer_is_"),
    "a GPU's default load": ("test_hub_modules.py::test_a_default_load_runs_",),
    "transformers' own doors": ("test_quantization_config.py::test_every_class_",),
    "graph breaks and hooks": (
        "test_limits.py::TestGraphBreaks::test_in_each_layer",
        "test_limits.py::TestHooks::test_every_layer_is_",
    ),
    "offloading": ("test_offloading.py::test_results_are_",),
    "autocast": ("test_autocast.py::test_every_form[",),
    "quantizing": ("test_quantize_on_load.py::test_weights_are_rounded_once_from_what_is_stored[",),
    "saving": ("test_saving.py::", "test_saving_compiled.py::test_transformers_loads_what_was_"),
    "dequantizing": ("test_dequantize.py::test_it_is_the_model_that_transformers_loads[",),
    "`generate`": ("test_generate.py::test_greedy_tokens_are_the_uncompiled_ones[",),
    "`free_weights`": ("test_free_weights.py::test_memory_is_given_back_",),
    "`explain`": ("test_explain.py::test_table",),
    "`verify`": ("test_verification.py::test_right_rewrites_pass[",),
    "Inductor": ("test_backend.py::TestInner::test_inductor[dtype0-",),
}
# What leans most on torch's compilers, and on how transformers writes a layer.
COMPILED = {
    "attention": (
        "test_fuse_attention.py::test_generate[whole",
        "test_fuse_attention.py::test_log",
    ),
    "linears": ("test_lower_linears.py::TestGptOss::test_whole",),
    "`mxfp4_fx.compile`": ("test_layerwise.py::TestCompilations::test_one_for_prompts_",),
    "regions": ("test_regions.py::test_layers_with_a_cache_", "test_regions.py::test_generate_gi"),
}
BEHAVIOURS: dict[str, dict[str, tuple[str, ...]]] = {
    "transformers": MODELS | COMPILED,
    "torch": MODELS
    | COMPILED
    | {
        "`mxfp4_fx.export`": (
            "test_exporting.py::test_a_program_computes_",
            "test_exporting.py::test_attention_is_reported",
        ),
        "`torch.export`": ("test_export.py::",),
        "private names": ("test_torch_private.py::", "test_torch_private_dynamo.py::"),
    },
    "triton": {
        "kernels in the interpreter": ("test_triton.py::test_every_regime[",),
        "models in the interpreter": ("test_triton_models.py::",),
        "kernels compiled for GPUs": ("test_ahead_of_time.py::test_nothing_spills",),
    },
    "kernels": {
        "loading": ("test_hub.py::test_the_package_is_imported_once", "test_hub.py::test_the_cho"),
        "errors": ("test_hub.py::test_an_empty_folder", "test_hub.py::test_a_package_that_"),
        "offline": ("test_hub.py::test_offline_",),
        "models": ("test_hub.py::test_a_whole_model[",),
    },
}


@dataclasses.dataclass(eq=False)  # pytest wants plugins to be hashable
class Selection:
    """A plugin of pytest that runs the tests of some behaviours and keeps their outcomes.

    Attributes:
        behaviours: behaviour -> the beginnings of its tests' names.
        passed: the behaviours with a test that passed.
        failed: behaviour -> what its first failed test says.
    """

    behaviours: Mapping[str, Sequence[str]]
    passed: set[str] = dataclasses.field(default_factory=set)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if self._of(item.nodeid)]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._fails(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._fails(report)
        elif report.passed and report.when == "call":
            self.passed.update(self._of(report.nodeid))

    def _of(self, node: str) -> list[str]:
        """Return the behaviours that a test shows, or some test of a file."""
        name = node.removeprefix("tests/")
        return [
            behaviour
            for behaviour, tests in self.behaviours.items()
            if any(name.startswith(test) or test.startswith(f"{name}::") for test in tests)
        ]

    def _fails(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        told = [line[1:] for line in report.longreprtext.splitlines() if line.startswith("E ")]
        for behaviour in self._of(report.nodeid):
            self.failed.setdefault(behaviour, (told or ["fails"])[0].strip())

    def outcomes(self) -> dict[str, str]:
        """Return behaviour -> `PASSES`, or why not."""
        found = dict.fromkeys(self.behaviours, "no test ran")
        return found | dict.fromkeys(self.passed, PASSES) | self.failed


def run(behaviours: Mapping[str, Sequence[str]], folder: Path) -> dict[str, str]:
    """Run the tests in a folder that show some behaviours; return :meth:`Selection.outcomes`."""
    selection = Selection(behaviours)
    files = {test.partition("::")[0] for tests in behaviours.values() for test in tests}
    options = ["-q", "-n0", "-m", "not exhaustive", "--continue-on-collection-errors"]
    options += ["-p", "no:cacheprovider"]
    pytest.main([*options, *(str(folder / file) for file in sorted(files))], plugins=[selection])
    return selection.outcomes()


if __name__ == "__main__":
    package, version, output, *names = sys.argv[1:]
    found = importlib.metadata.version(package)
    assert found.partition("+")[0] == version, f"{package} {found} is found, not {version}"
    chosen = {name: BEHAVIOURS[package][name] for name in names}
    Path(output).write_text(json.dumps(run(chosen, TESTS)), "utf-8")
