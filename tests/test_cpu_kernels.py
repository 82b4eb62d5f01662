"""What only the CPU's native kernels do, on every path that runs here; test_ops.py has the rest."""

from __future__ import annotations

import functools
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import oracle
import pytest
import torch
from combinations import covering, exhaustive
from implementations import ARM_PATHS, CPU_PATHS, Kernels, check_matmul, chosen, int32, randn
from models import DTYPES
from oracle import Bounded, Matrices, assert_within, random_routes
from processes import LAST_RESORT
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mxfp4_fx.core import hardware
from mxfp4_fx.core.errors import KernelsUnavailableError, NativeBuildError, SlowKernelsWarning
from mxfp4_fx.ops import native, target

ops = torch.ops.mxfp4


@pytest.fixture(params=CPU_PATHS)
def cpu(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    with chosen(f"cpu:{request.param}") as kernels:
        yield kernels


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- sizes: tiles, panels and chunks that are full, partly filled and several

ROWS = (1, 2, 3, 4, 5, 6, 7, 12, 13, 16, 17, 33, 97)  # of one expert


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_any_number_of_rows_of_an_expert(cpu: Kernels, rows: int, dtype: torch.dtype) -> None:
    """Few rows go through integers; more fill tiles, of which the last may be lower."""
    indices = torch.zeros((rows, 1), dtype=torch.long)
    check_matmul(cpu, randn(rows, 96, dtype=dtype), Matrices.random(1, 66, 96, dtype), indices)


@pytest.mark.parametrize(
    ("dtype", "k", "rows"), covering(DTYPES, (32, 64, 288, 3104, 6240), (1, 5, 40))
)
def test_any_number_of_columns(cpu: Kernels, rows: int, k: int, dtype: torch.dtype) -> None:
    indices = torch.zeros((rows, 1), dtype=torch.long)
    check_matmul(cpu, randn(rows, k, dtype=dtype), Matrices.random(1, 34, k, dtype), indices)


@pytest.mark.parametrize(
    ("t", "n", "activation"),
    covering((1, 30), (2, 30, 32, 34, 62, 64, 66, 200, 600), ("none", "swiglu")),
)
def test_any_number_of_output_columns(cpu: Kernels, t: int, n: int, activation: str) -> None:
    matrices, indices = Matrices.random(3, n, 64), random_routes(t, 3, 2)[0]
    check_matmul(cpu, randn(t, 64), matrices, indices, activation=activation)


# ---- scales


@pytest.mark.parametrize(
    ("dtype", "exponent", "rows"),
    covering((torch.float32, torch.bfloat16), (0, -20), (1, 2, 20)),
)
def test_every_scale(cpu: Kernels, rows: int, exponent: int, dtype: torch.dtype) -> None:
    """Expert e has scale byte e, and tokens so small or large that results are near 2^exponent."""
    blocks = Matrices.random(255, 2, 64).blocks
    # 6 * 2^126 would be no float32 any more, and the weights are float32 numbers before all else.
    blocks[253:] &= 0b1011_1011
    scales = torch.arange(255, dtype=torch.uint8)[:, None, None].expand(255, 2, 2).contiguous()
    matrices = Matrices(blocks, scales, torch.zeros((255, 2), dtype=dtype))
    exponents = (127 + exponent - torch.arange(255)).clamp(max=124).repeat_interleave(rows)
    x = (randn(255 * rows, 64).double() * torch.exp2(exponents.double())[:, None]).to(dtype)
    indices = torch.arange(255).repeat_interleave(rows)[:, None]
    check_matmul(cpu, x, matrices, indices, gammas=False, activation="none")


@pytest.mark.parametrize(("rows", "scale"), [(1, 254), (20, 254), (1, 255)])
def test_a_flag_holds_for_its_panel_alone(cpu: Kernels, rows: int, scale: int) -> None:
    """One scale in one of ten panels is outside of what the fast kernels can hold."""
    matrices = Matrices.random(2, 160, 128)
    scales, blocks = matrices.scales.clone(), matrices.blocks.clone()
    scales[1, 70, 1] = scale
    blocks[1, 70, 1] &= 0b1011_1011
    x = randn(2 * rows, 128)
    if scale == 254:
        x[:, 32:64] *= 2.0**-126  # what meets that scale
    indices = torch.arange(2 * rows)[:, None] % 2
    check_matmul(cpu, x, Matrices(blocks, scales, matrices.bias), indices, activation="none")


# ---- activations


SPREADS = {"moderate": (-8, 8), "wide": (-45, 40), "tiny": (-149, -110), "all": (-149, 60)}


@pytest.mark.parametrize(
    ("dtype", "spread", "rows"), covering(DTYPES, list(SPREADS), (1, 2, 5, 20))
)
def test_activations_of_any_magnitude(
    cpu: Kernels, rows: int, spread: str, dtype: torch.dtype
) -> None:
    """Powers of two far apart in a block, subnormal ones too: too far for any fixed point."""
    generator = torch.Generator().manual_seed(rows)
    exponents = torch.randint(*SPREADS[spread], (rows, 160), generator=generator)
    if dtype == torch.float16:
        exponents = exponents // 8  # -19 is among its subnormal numbers, too
    x = (randn(rows, 160).double() * torch.exp2(exponents)).to(dtype)
    x[:, 7] = 0
    matrices = Matrices.random(1, 34, 160)
    matrices = Matrices(matrices.blocks, matrices.scales, torch.zeros_like(matrices.bias))
    indices = torch.zeros((rows, 1), dtype=torch.long)
    check_matmul(cpu, x, matrices, indices, gammas=False, activation="none")


@pytest.mark.parametrize(
    ("dtype", "value", "rows"), covering(DTYPES, (torch.nan, torch.inf, -torch.inf), (1, 2, 20))
)
def test_a_row_with_nan_or_infinity(
    cpu: Kernels, rows: int, value: float, dtype: torch.dtype
) -> None:
    """Zero times infinity is NaN, other codes give infinities: as the reference has it."""
    x, matrices = randn(rows, 64, dtype=dtype), Matrices.random(1, 40, 64)
    x[-1, 33] = value
    offsets = int32([0, rows])
    y = cpu.matmul_ogs(x, matrices, offsets)
    expected = Kernels("reference").matmul_ogs(x, matrices, offsets)
    assert torch.equal(y[-1].isnan(), expected[-1].isnan())
    assert torch.equal(y[-1].isinf(), expected[-1].isinf())
    assert y[:-1].isfinite().all()


@pytest.mark.parametrize("rows", [2, 4, 20, 40])
def test_a_row_that_needs_float32_leaves_the_others_alone(cpu: Kernels, rows: int) -> None:
    """One row of one tile or several has a subnormal number, or an infinite one."""
    x, matrices = randn(rows, 64, dtype=torch.bfloat16), Matrices.random(1, 320, 64, torch.bfloat16)
    offsets = int32([0, rows])
    expected = cpu.matmul_ogs(x, matrices, offsets)
    for value in (2.0**-130, torch.inf):
        changed = x.clone()
        changed[rows // 2, 33] = value
        y = cpu.matmul_ogs(changed, matrices, offsets)
        others = torch.arange(rows) != rows // 2
        assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 4, 20])
def test_no_bit_of_an_activation_is_lost(cpu: Kernels, rows: int, dtype: torch.dtype) -> None:
    """x meets a single weight of one, so that the results are x itself, bit for bit."""
    codes = torch.zeros((1, 64, 64), dtype=torch.uint8)
    codes[0].fill_diagonal_(2)  # 1.0
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    scales = torch.full((1, 64, 2), 127, dtype=torch.uint8)
    eye = Matrices(packed.view(1, 64, 2, 16), scales, torch.zeros(1, 64))
    x = randn(rows, 64, dtype=dtype)
    assert torch.equal(cpu.matmul_ogs(x, eye, int32([0, rows])), x)


# ---- tensors that lie oddly


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3])
def test_operands_at_any_address(cpu: Kernels, offset: int, dtype: torch.dtype) -> None:
    x, matrices = randn(9, 64, dtype=dtype), Matrices.random(2, 66, 64, dtype)
    parts = cpu.operands(matrices)[:3]
    gammas, gather, scatter, offsets = cpu.routing(randn(9, 2), 2)

    def run(move: bool) -> Tensor:
        moved = functools.partial(elsewhere, offset=offset) if move else (lambda tensor: tensor)
        y: Tensor = ops.matmul_ogs(
            moved(x), *map(moved, parts), 66, *map(moved, (offsets, gather, scatter, gammas)),
            experts_per_token=2, layout=cpu.layout, kernels="cpu",
        )  # fmt: skip
        return y

    assert torch.equal(run(True), run(False))


def elsewhere(tensor: Tensor, offset: int) -> Tensor:
    """The same values `offset` elements into a memory of their own."""
    room = tensor.new_empty(tensor.numel() + offset)[offset:]
    return room.view(tensor.shape).copy_(tensor)


def test_rows_with_gaps_and_experts_from_a_slice(cpu: Kernels) -> None:
    matrices = Matrices.random(6, 66, 64)
    blocks, scales, bias, n = cpu.operands(matrices)
    x = randn(9, 200)[:, 5:69]
    assert x.stride() == (200, 1)
    y = ops.matmul_ogs(
        x, blocks[1::2], scales[1::2], bias[1::2], n, int32([0, 2, 4, 9]),
        layout=cpu.layout, kernels="cpu",
    )  # fmt: skip
    part = Matrices(*(operand[1::2] for operand in matrices.operands))
    expert = torch.tensor([0] * 2 + [1] * 2 + [2] * 5)
    expected = oracle.grouped_linear(Bounded.exact(x), expert, *part.exact)
    assert_within(y, expected.rounded(torch.float32))


# ---- threads and processes


@pytest.mark.parametrize(("dtype", "t", "scatter"), covering(DTYPES, (1, 9, 200), (False, True)))
def test_same_bits_for_any_number_of_threads(
    cpu: Kernels, t: int, scatter: bool, dtype: torch.dtype, threads: None
) -> None:
    x, matrices = randn(t, 96, dtype=dtype), Matrices.random(5, 200, 96, dtype)
    results = []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        gammas, gather, slots, offsets = cpu.routing(randn(t, 5), 3)
        index = (gather, slots, gammas) if scatter else (gather,)
        results.append(
            cpu.matmul_ogs(x, matrices, offsets, *index, experts_per_token=3 if scatter else 1)
        )
    for other in results[1:]:
        assert torch.equal(results[0], other)


def test_flushing_of_subnormals_by_torch_changes_nothing(cpu: Kernels, threads: None) -> None:
    """It holds for one thread and not for another; a scale byte of 0 is a subnormal number."""
    matrices = Matrices.random(1, 256, 64)
    matrices = Matrices(matrices.blocks, torch.zeros_like(matrices.scales), torch.zeros(1, 256))
    x = randn(20, 64) * 2.0**100
    torch.set_num_threads(2)
    expected = cpu.matmul_ogs(x, matrices, int32([0, 20]))
    try:
        assert torch.set_flush_denormal(True)
        assert torch.equal(cpu.matmul_ogs(x, matrices, int32([0, 20])), expected)
    finally:
        torch.set_flush_denormal(False)


def test_two_threads_of_python_at_once(cpu: Kernels) -> None:
    matrices, offsets = Matrices.random(4, 200, 96), int32([0, 10, 20, 30, 40])
    inputs = [randn(40, 96, seed=seed) for seed in range(8)]
    expected = [cpu.matmul_ogs(x, matrices, offsets) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: cpu.matmul_ogs(x, matrices, offsets), inputs * 20))
    for i, y in enumerate(found):
        assert torch.equal(y, expected[i % 8])


class Outputs(Dataset[Tensor]):
    """Items that are computed by the kernels where they are asked for."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        kernels = Kernels("cpu")
        x = randn(20, 64, seed=index)
        return kernels.matmul_ogs(x, Matrices.random(2, 64, 64), int32([0, 9, 20]))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", exhaustive("spawn")])
def test_in_the_workers_of_a_data_loader(method: str) -> None:
    """Forked from a process whose threads have worked already, and new ones."""
    here = torch.stack([Outputs()[i] for i in range(4)])
    loader = DataLoader(
        Outputs(), batch_size=1, num_workers=2, multiprocessing_context=method, timeout=LAST_RESORT
    )
    assert torch.equal(torch.cat(list(loader)), here)


FIRST_USE_IN_A_CHILD = """
import os, sys
import torch
from implementations import Kernels, int32, randn
from oracle import Matrices

torch.set_num_threads(2)
x = torch.randn(512, 512) @ torch.randn(512, 512)  # starts torch's threads
child = os.fork()
if not child:
    y = Kernels("cpu").matmul_ogs(randn(20, 64), Matrices.random(2, 64, 64), int32([0, 9, 20]))
    os._exit(0 if y.isfinite().all() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_that_is_the_first_to_use_them() -> None:
    subprocess.run(
        [sys.executable, "-c", FIRST_USE_IN_A_CHILD],
        check=True, timeout=LAST_RESORT,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip


# ---- bad input


WRONG = {
    "gather too large": {"gather_index": int32([0, 0, 1, 2])},
    "gather negative": {"gather_index": int32([0, 0, -1, 1])},
    "gather beyond 32 bits": {"gather_index": torch.tensor([0, 0, 1, 2**32])},
    "scatter too large": {"scatter_index": int32([0, 1, 2, 4])},
    "offset too large": {"expert_offsets": int32([0, 3, 5])},
    "offsets that fall": {"expert_offsets": int32([0, 3, 2])},
    "offset beyond 32 bits": {"expert_offsets": torch.tensor([0, 1, 2**32 + 4])},
    "offset negative": {"expert_offsets": int32([-1, 3, 4])},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_an_index_outside_its_tensor_is_an_error(cpu: Kernels, wrong: dict[str, Tensor]) -> None:
    weight = cpu.operands(Matrices.random(2, 6, 64))
    arguments = {
        "expert_offsets": int32([0, 1, 4]),
        "gather_index": int32([0, 0, 1, 1]),
        "scatter_index": int32([0, 1, 2, 3]),
        **wrong,
    }
    with pytest.raises(ValueError, match="points outside its tensor: there are 2 rows of x and 4"):
        ops.matmul_ogs(
            randn(2, 64), *weight, **arguments, experts_per_token=2,
            layout="cpu_panels", kernels="cpu",
        )  # fmt: skip


def test_another_layout_is_an_error() -> None:
    with pytest.raises(ValueError, match="kernels='cpu' reads layout 'cpu_panels', not 'row_major"):
        ops.matmul_ogs(
            randn(2, 64), *Matrices.random(1, 6, 64).operands, 6, int32([0, 2]), kernels="cpu"
        )


# ---- which kernels a machine gets


@pytest.fixture
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """What is asked once a process is asked again."""
    facts = (hardware.cpu_path, hardware.runnable_paths, hardware._cpu_facts)
    cached = (*facts, target._warn_slow)
    for function in cached:
        function.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for function in cached:
        function.cache_clear()


CPU = torch.device("cpu")
# Flags as Linux writes them in /proc/cpuinfo, of those that matter.
HASWELL = frozenset({"avx2", "bmi2", "f16c", "fma"})
SKYLAKE = HASWELL | {"avx512bw", "avx512dq", "avx512f", "avx512vl"}
CASCADE_LAKE = SKYLAKE | {"avx512_vnni"}
COOPER_LAKE = CASCADE_LAKE | {"avx512_bf16"}
GENOA = COOPER_LAKE | {"avx512vbmi"}
SAPPHIRE_RAPIDS = GENOA | {"amx_bf16", "amx_tile"}
GRAVITON2 = frozenset({"asimd", "asimddp", "fphp"})
GRAVITON3 = GRAVITON2 | {"bf16", "i8mm", "sve"}
INTEL, AMD = "GenuineIntel", "AuthenticAMD"
CPUS = {
    "EPYC Genoa": (AMD, GENOA, "avx512_bf16"),
    "EPYC Milan": (AMD, HASWELL, "avx2"),
    "Xeon Sapphire Rapids": (INTEL, SAPPHIRE_RAPIDS, "amx"),
    # It has vdpbf16ps at half the rate of its float32.
    "Xeon Cooper Lake": (INTEL, COOPER_LAKE, "avx512"),
    "Xeon Skylake": (INTEL, SKYLAKE, "avx2"),
    "Xeon Cascade Lake": (INTEL, CASCADE_LAKE, "avx512"),
    "an old one": (INTEL, frozenset({"sse4_2", "avx"}), "portable"),
    "Graviton 3": ("", GRAVITON3, "neon_bf16"),
    "Graviton 2": ("", GRAVITON2, "neon_dotprod"),
    "an ARM with half of it": ("", GRAVITON3 - {"i8mm"}, "neon_dotprod"),
    "an ARM with the other half": ("", GRAVITON3 - {"bf16"}, "neon_dotprod"),
    "Graviton 1": ("", frozenset({"asimd"}), "portable"),
    "neither x86 nor ARM": ("", frozenset(), "portable"),
}


@pytest.mark.parametrize("name", CPUS)
def test_the_path_of_a_cpu(fresh_choice: pytest.MonkeyPatch, name: str) -> None:
    vendor, flags, path = CPUS[name]
    fresh_choice.delenv(hardware.CPU_PATH_VARIABLE, raising=False)
    fresh_choice.setattr(hardware, "_cpu_facts", lambda: (vendor, flags))
    fresh_choice.setattr(hardware, "_amx_is_permitted", lambda: True)
    assert hardware.cpu_path() == path


@pytest.mark.parametrize("flag", sorted(SAPPHIRE_RAPIDS))
def test_a_path_needs_each_of_its_flags(fresh_choice: pytest.MonkeyPatch, flag: str) -> None:
    needed = {"amx": SAPPHIRE_RAPIDS, "avx512_bf16": GENOA, "avx512": CASCADE_LAKE, "avx2": HASWELL}
    fresh_choice.setattr(hardware, "_cpu_facts", lambda: (INTEL, SAPPHIRE_RAPIDS - {flag}))
    fresh_choice.setattr(hardware, "_amx_is_permitted", lambda: True)
    left = [path for path, flags in needed.items() if flag not in flags]
    assert hardware.runnable_paths() == (*left, "portable")


@pytest.mark.parametrize(
    ("machine", "name", "found"),
    [("x86_64", "flags", {"avx2", "fma"}), ("aarch64", "Features", {"asimd", "asimddp"})],
)
def test_flags_are_read_as_linux_writes_them(
    fresh_choice: pytest.MonkeyPatch, machine: str, name: str, found: set[str]
) -> None:
    text = f"processor\t: 0\n{name}\t: {' '.join(found)}\n\nprocessor\t: 1\n{name}\t: none\n"
    fresh_choice.setattr(hardware.platform, "machine", lambda: machine)
    fresh_choice.setattr("builtins.open", lambda *_, **__: io.StringIO(text))
    assert hardware._cpu_facts()[1] == found


def test_the_flags_of_an_arm_are_one_architecture() -> None:
    flags = {path: hardware.CPU_PATHS[path].compiler_flags for path in ARM_PATHS}
    assert flags == {
        "neon_bf16": ("-march=armv8.2-a+dotprod+i8mm+bf16",),
        "neon_dotprod": ("-march=armv8.2-a+dotprod",),
    }


def test_amx_that_the_system_forbids_is_not_used(fresh_choice: pytest.MonkeyPatch) -> None:
    fresh_choice.delenv(hardware.CPU_PATH_VARIABLE, raising=False)
    fresh_choice.setattr(hardware, "_cpu_facts", lambda: (INTEL, SAPPHIRE_RAPIDS))
    fresh_choice.setattr(hardware, "_amx_is_permitted", lambda: False)
    assert hardware.cpu_path() == "avx512"


@pytest.mark.parametrize("path", CPU_PATHS)
def test_the_reason_names_path_and_variable(fresh_choice: pytest.MonkeyPatch, path: str) -> None:
    fresh_choice.setenv(hardware.CPU_PATH_VARIABLE, path)
    found = target.choose(CPU)
    assert (found.kernels, found.layout) == ("cpu", "cpu_panels")
    assert f"{path}: MXFP4_FX_CPU says so" in found.reason
    assert f"on {torch.get_num_threads()} CPU threads" in found.reason


def test_a_path_that_is_none(fresh_choice: pytest.MonkeyPatch) -> None:
    fresh_choice.setenv(hardware.CPU_PATH_VARIABLE, "avx3")
    with pytest.raises(KernelsUnavailableError, match="MXFP4_FX_CPU='avx3' is not one of amx, "):
        target.choose(CPU)


def test_a_path_that_this_cpu_cannot_run(fresh_choice: pytest.MonkeyPatch) -> None:
    fresh_choice.setattr(hardware, "_cpu_facts", lambda: (INTEL, HASWELL))
    fresh_choice.setenv(hardware.CPU_PATH_VARIABLE, "avx512")
    with pytest.raises(KernelsUnavailableError, match=r"lacks avx512_vnni, .*runs avx2, portable"):
        target.choose(CPU)


def no_compiler(path: str) -> None:
    raise NativeBuildError("there is no C++ compiler; install g++")


def test_without_a_compiler_pytorch_serves_and_says_so_once(
    fresh_choice: pytest.MonkeyPatch,
) -> None:
    fresh_choice.setattr(native, "load", no_compiler)
    with pytest.warns(SlowKernelsWarning, match="slower than natively: there is no C") as warned:
        found = [target.choose(CPU) for _ in range(3)]
    assert len(warned) == 1
    assert {(f.kernels, f.layout) for f in found} == {("pytorch", "row_major")}
    assert "there is no C++ compiler" in found[0].reason


def test_kernels_that_compute_wrong_results_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As of a faulty compiler: a small problem with known results is computed before any use."""
    sources = Path(shutil.copytree(native._SOURCES, tmp_path / "cpu"))
    numbers = (sources / "numbers.h").read_text()
    assert "3.f,  4.f" in numbers
    (sources / "numbers.h").write_text(numbers.replace("3.f,  4.f", "3.f,  5.f"))
    monkeypatch.setenv(native.CACHE_DIR_VARIABLE, str(tmp_path / "libraries"))
    monkeypatch.setenv("MXFP4_FX_CXXFLAGS", "-O0")  # compiles in a third of the time
    monkeypatch.setattr(native, "_SOURCES", sources)
    monkeypatch.setattr(native, "libraries", native.libraries.anew())
    with pytest.raises(NativeBuildError, match="portable CPU kernels compute wrong results"):
        native.load("portable")


def test_without_a_compiler_asking_for_native_is_an_error(
    fresh_choice: pytest.MonkeyPatch,
) -> None:
    fresh_choice.setattr(native, "load", no_compiler)
    with pytest.raises(KernelsUnavailableError, match=r"kernels='cpu' was asked for.*install g"):
        target.choose(CPU, "cpu")


def test_pytorch_on_request_compiles_nothing(fresh_choice: pytest.MonkeyPatch) -> None:
    fresh_choice.setattr(native, "load", no_compiler)
    assert target.choose(CPU, "pytorch").layout == "row_major"


@pytest.mark.exhaustive
def test_importing_and_choosing_pytorch_loads_no_library() -> None:
    code = (
        "import torch, mxfp4_fx; from mxfp4_fx.ops import native, target; "
        "target.choose(torch.device('cpu'), 'pytorch'); assert not native.libraries.loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
