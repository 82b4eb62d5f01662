"""safetensors files: what is damaged is refused by name, what is whole is mapped in parts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mxfp4_fx.checkpoints.safetensors_file import TensorSpec, cut, read_header, write_safetensors
from mxfp4_fx.core.errors import CheckpointError

A = {"dtype": "U8", "shape": [2, 5], "data_offsets": [0, 10]}
B = {"dtype": "BF16", "shape": [3], "data_offsets": [10, 16]}


def contents(header: Any, data: bytes) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


DAMAGE = {
    "empty": (b"", "is not a safetensors file"),
    "too short for a length": (b"abc", "is not a safetensors file"),
    "random bytes": (bytes(range(128, 256)), "is not a safetensors file"),
    "cut in its header": (contents(A, b"")[:20], "is cut short: it has 20 bytes, .* alone has"),
    "cut in its data": (contents({"a": A}, b"123456789"), r"is cut short: .* its header says \d+"),
    "followed by more": (contents({"a": A}, b"12345678901"), "is longer than it should be"),
    "no JSON": (contents(b"{" * 16, b""), "header .* is damaged"),
    "no UTF-8": (contents(b"\xff" * 16, b""), "header .* is damaged"),
    "no object": (contents([1], b""), "header .* is damaged"),
    "a list for a tensor": (contents({"a": [1]}, b""), "header .* is damaged"),
    "no dtype": (contents({"a": {"shape": [1]}}, b""), "header .* is damaged"),
    "unknown dtype": (contents({"a": A | {"dtype": "X8"}}, b"0" * 10), "a has the unknown dtype"),
    "more bytes than values": (
        contents({"a": A | {"shape": [9]}}, b"0" * 10),
        "a needs 9 bytes and is given 10",
    ),
    "negative size": (contents({"a": A | {"shape": [-2, -5]}}, b"0" * 10), "no natural number"),
    "overlap": (contents({"a": A, "b": A}, b"0" * 10), "b does not begin where"),
    "gap": (contents({"b": B}, b"0" * 16), "b does not begin where"),
    "a name twice": (
        contents(b'{"a": %s, "a": %s}' % ((json.dumps(A).encode(),) * 2), b"0" * 10),
        "a name occurs twice",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_told_with_the_file_and_the_remedy(file: Path, case: str) -> None:
    content, message = DAMAGE[case]
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert str(caught.value).endswith(": copy or download the file again")


@pytest.mark.parametrize("case", [case for case in DAMAGE if case != "a name twice"])
def test_what_is_refused_is_refused_by_safetensors_too(file: Path, case: str) -> None:
    file.write_bytes(DAMAGE[case][0])
    with pytest.raises(SafetensorError), safe_open(file, "pt"):
        pass


def test_a_git_lfs_pointer_is_recognised(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4792272488\n")
    with pytest.raises(CheckpointError, match=r"Git LFS pointer .*: run git lfs pull"):
        read_header(file)


def test_a_file_that_is_not_there_is_named(file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read \(No such file"):
        read_header(file)


def test_an_error_of_a_nested_header_is_no_crash(file: Path) -> None:
    file.write_bytes(contents(b"[" * 200_000, b""))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_header(file)


# ---- reading ------------------------------------------------------------------------------------

DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.bool)


def every_kind() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    values = {str(d): torch.randint(0, 2, (3, 5, 7)).to(d) for d in DTYPES}
    return values | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(3, 0),
        "none": torch.empty(0),
    }


def test_tensors_read_are_those_written_by_safetensors(file: Path) -> None:
    tensors = every_kind()
    save_file(tensors, file)
    stored = read_header(file)
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = stored[name].read()
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(read, tensor), name


def test_a_part_is_an_entry_of_the_first_dimension(file: Path) -> None:
    tensors = every_kind()
    save_file(tensors, file)
    for name, stored in read_header(file).items():
        for i in range(3 if tensors[name].dim() > 1 else 0):
            assert torch.equal(stored.read(i), tensors[name][i]), (name, i)


def test_an_entry_that_is_not_there_is_an_error(file: Path) -> None:
    save_file(every_kind(), file)
    stored = read_header(file)
    for name, index in (("torch.uint8", 3), ("torch.uint8", -1), ("scalar", 0), ("none", 0)):
        with pytest.raises(IndexError, match=f"{name} .* has no entry {index}"):
            stored[name].read(index)


def test_misaligned_tensors_are_read(file: Path) -> None:
    header = {"a": A | {"shape": [11], "data_offsets": [0, 11]}}
    header["b"] = B | {"data_offsets": [11, 17]}
    values = torch.tensor([1.0, -2.0, 3.5], dtype=torch.bfloat16)
    data = bytes(11) + values.view(torch.uint8).numpy().tobytes()
    encoded = json.dumps(header).encode()
    file.write_bytes(contents(encoded + b" " * (-len(encoded) % 8), data))
    read = read_header(file)["b"].read()
    assert torch.equal(read, values)
    assert read.data_ptr() % values.itemsize == 0


def test_writing_to_what_was_read_leaves_the_file(file: Path) -> None:
    save_file({"a": torch.zeros(8)}, file)
    before = file.read_bytes()
    read_header(file)["a"].read().fill_(1)
    assert file.read_bytes() == before


def test_chunks_are_the_bytes_in_order(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mxfp4_fx.checkpoints.safetensors_file.CHUNK_BYTES", 7)
    tensors = every_kind()
    save_file(tensors, file)
    for name, stored in read_header(file).items():
        data = b"".join(bytes(chunk) for chunk in stored.chunks())
        assert data == tensors[name].flatten().view(torch.uint8).numpy().tobytes(), name


def test_a_file_that_shrinks_is_an_error_and_no_crash(file: Path) -> None:
    save_file({"a": torch.zeros(1 << 16)}, file)
    stored = read_header(file)["a"]
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="became shorter while it was read: copy"):
        stored.read()
    with pytest.raises(CheckpointError, match="became shorter while it was read: copy"):
        list(stored.chunks())


@pytest.mark.exhaustive
def test_reading_in_parts_takes_a_parts_memory(file: Path) -> None:
    """256 MiB in 64 parts; the process may grow by an eighth of that."""
    spec = TensorSpec("a", torch.uint8, (64, 4 << 20))
    part = memoryview(bytes(4 << 20))
    write_safetensors(file, [spec], (("a", part) for _ in range(64)))
    code = f"""
import re
from pathlib import Path
from mxfp4_fx.checkpoints.safetensors_file import read_header
# Not getrusage's, which a process inherits from the one that started it.
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
stored = read_header(Path({str(file)!r}))["a"]
before = peak()
for i in range(64):
    assert not stored.read(i).any()
for chunk in stored.chunks():
    pass
grown = peak() - before
assert grown <= 32, grown
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- writing ------------------------------------------------------------------------------------

SPECS = [TensorSpec("a", torch.uint8, (2, 3)), TensorSpec("b", torch.float32, (2,))]


def test_parts_may_come_in_any_order_of_tensors(file: Path) -> None:
    b = memoryview(torch.tensor([1.5, -2.5]).numpy().tobytes())
    a = memoryview(bytes(range(6)))
    write_safetensors(file, SPECS, [("b", b[:4]), ("a", a[:2]), ("b", b[4:]), ("a", a[2:])])
    read = load_file(file)
    assert torch.equal(read["a"], torch.arange(6, dtype=torch.uint8).view(2, 3))
    assert torch.equal(read["b"], torch.tensor([1.5, -2.5]))


@pytest.mark.parametrize("nbytes", [0, 5, 7, 20])
def test_another_number_of_bytes_is_refused(file: Path, nbytes: int) -> None:
    parts = [("b", memoryview(bytes(8))), ("a", memoryview(bytes(nbytes)))]
    with pytest.raises(ValueError, match="a was given another number of bytes than it has"):
        write_safetensors(file, SPECS, parts)


def test_shards_are_full_but_never_over() -> None:
    sizes = [3, 3, 5, 1, 1, 9, 2]
    shards = cut(sizes, lambda size: size, 6)
    assert list(shards.values()) == [[3, 3], [5, 1], [1], [9], [2]]
    assert list(shards)[:2] == [
        "model-00000-of-00004.safetensors",
        "model-00001-of-00004.safetensors",
    ]
