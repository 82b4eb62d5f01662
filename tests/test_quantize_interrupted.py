"""Quantizing a checkpoint that is interrupted: nothing looks finished, and the next run goes on."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes
import pytest
from checkpoints import TINY, convert, copied, edit_tensors, files, randomize, write_dense

from mxfp4_fx.checkpoints import consistency, quantize
from mxfp4_fx.checkpoints.checkpoint import Checkpoint
from mxfp4_fx.checkpoints.random_weights import CheckpointShape
from mxfp4_fx.checkpoints.safetensors_file import read_header
from mxfp4_fx.core.errors import CheckpointError

# ---- interruptions ------------------------------------------------------------------------------

CUT = {"max_shard_bytes": 1}  # a file for each tensor, 37 of them


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edit_tensors(write_dense(tmp_path_factory.mktemp("dense")), randomize)


@contextmanager
def stopped_run(source: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, stopped between its 20th shard and its journal."""
    # The journal is written at first, and after each shard.
    code = processes.stopping("os.rename", "journal.writing", times=21)
    code += "from mxfp4_fx.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "quantize", str(source), str(out)]
    process = subprocess.Popen([*command, "--max-shard-bytes=1"], text=True, stderr=subprocess.PIPE)
    try:
        processes.wait_until_stopped(process)
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr
        process.stderr.close()


def complete(out: Path) -> list[Path]:
    """Shards of an interrupted run."""
    return sorted((partial(out) / "checkpoint").glob("*.safetensors"))


def partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


@pytest.fixture(scope="module")
def killed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output of a killed run, and what another run was told while it worked."""
    out = tmp_path_factory.mktemp("killed") / "out"
    with stopped_run(dense, out) as process:
        before = complete(out)
        with pytest.raises(CheckpointError) as refused:
            convert(dense, out, **CUT)
        assert complete(out) == before
        stderr = processes.end(process, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, stderr
    return out, str(refused.value)


def test_a_killed_run_leaves_nothing_that_looks_finished(killed: tuple[Path, str]) -> None:
    out, _ = killed
    assert list(out.parent.iterdir()) == [partial(out)]
    assert [file.name for file in partial(out).rglob("*.json")] == ["journal.json"]
    assert len(complete(out)) == 20
    for file in complete(out):
        read_header(file)


def test_a_killed_run_goes_on(dense: Path, killed: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(partial(killed[0]), partial(out))
    journal = json.loads((partial(out) / "journal.json").read_text())
    done = {name: (partial(out) / "checkpoint" / name).stat() for name in journal["shards"]}
    assert len(done) == 19
    whole = files(convert(dense, tmp_path / "whole", **CUT))
    assert files(convert(dense, out, **CUT)) == whole
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}
    for name, before in done.items():
        after = (out / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.exhaustive
def test_ctrl_c_says_how_to_go_on(dense: Path, tmp_path: Path) -> None:
    with stopped_run(dense, tmp_path / "out") as process:
        stderr = processes.end(process, signal.SIGINT)
    assert process.returncode == 130, stderr
    assert "interrupted: the same command goes on after the last whole shard" in stderr
    assert "Traceback" not in stderr
    consistency.check(Checkpoint.open(convert(dense, tmp_path / "out", **CUT)))


def test_one_run_at_a_time(killed: tuple[Path, str]) -> None:
    assert re.search(r"another process works on .*out\.partial: wait", killed[1])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Input and output of a run that was not able to write a file of 100 kB, the sixth or so."""
    path = tmp_path_factory.mktemp("stopped")
    write_dense(path / "in", CheckpointShape(**{**vars(TINY), "experts": 16}))
    code = f"""
import resource
from mxfp4_fx.checkpoints.quantize import quantize_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
quantize_checkpoint({str(path / "in")!r}, {str(path / "out")!r}, max_shard_bytes=1, progress=False)
"""
    ended = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    message = r"CheckpointError: .*File too large.*: repair that, and the same command goes on from"
    assert re.search(message, ended.stderr), ended.stderr
    assert complete(path / "out")
    return path


@pytest.fixture
def interrupted(stopped: Path, tmp_path: Path) -> tuple[Path, Path]:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)  # which keeps times
    return tmp_path / "in", tmp_path / "out"


def test_a_run_whose_disk_failed_goes_on(interrupted: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = interrupted
    assert files(convert(source, out, **CUT)) == files(convert(source, tmp_path / "whole", **CUT))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_shard_bytes": 2}, "max_shard_bytes"),
        ({**CUT, "skip": ["model.layers.0"]}, "modules_to_not_convert"),
        ({**CUT, "scale_rule": "search"}, "scale_rule"),
    ],
)
def test_other_options_do_not_go_on(
    interrupted: tuple[Path, Path], options: Any, name: str
) -> None:
    source, out = interrupted
    before = files(partial(out))
    with pytest.raises(CheckpointError, match=rf"partial is left .* another {name}: remove it"):
        convert(source, out, **options)
    assert files(partial(out)) == before


def test_shards_that_nobody_measured_are_measured(
    interrupted: tuple[Path, Path], tmp_path: Path
) -> None:
    source, out = interrupted
    errors: list[dict[str, float]] = []
    convert(source, out, **CUT, report=errors.append)
    convert(source, tmp_path / "whole", **CUT, report=errors.append)
    assert errors[0] == errors[1]
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_another_input_does_not_go_on(interrupted: tuple[Path, Path], name: str) -> None:
    source, out = interrupted
    content = (source / name).read_bytes()
    (source / name).unlink()
    (source / name).write_bytes(content)  # the same, for all that can be seen, but for its time
    with pytest.raises(CheckpointError, match="is left from a run with another input: remove it"):
        convert(source, out, **CUT)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"input": 1'])
def test_a_damaged_journal(interrupted: tuple[Path, Path], content: str) -> None:
    source, out = interrupted
    (partial(out) / "journal.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"journal\.json is damaged: remove .*out\.partial"):
        convert(source, out, **CUT)


@pytest.mark.parametrize("shards", [[], 1, {"a": 1}, {"a": {}}], ids=str)
def test_a_journal_whose_shards_are_damaged(interrupted: tuple[Path, Path], shards: object) -> None:
    source, out = interrupted
    journal = partial(out) / "journal.json"
    journal.write_text(json.dumps(json.loads(journal.read_text()) | {"shards": shards}))
    with pytest.raises(CheckpointError, match=r"journal\.json is damaged: remove .*out\.partial"):
        convert(source, out, **CUT)


def test_shards_without_a_journal(interrupted: tuple[Path, Path]) -> None:
    source, out = interrupted
    (partial(out) / "journal.json").unlink()
    with pytest.raises(CheckpointError, match=r"out\.partial has no journal of its shards: remove"):
        convert(source, out, **CUT)


def test_shards_that_went_missing_are_written_again(interrupted: tuple[Path, Path]) -> None:
    source, out = interrupted
    first, second, *_ = complete(out)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    consistency.check(Checkpoint.open(convert(source, out, **CUT)))


def test_damage_is_found_before_the_output_appears(interrupted: tuple[Path, Path]) -> None:
    source, out = interrupted
    shard = complete(out)[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (name,) = list(read_header(shard))[-1:]
    with pytest.raises(
        CheckpointError, match=rf"^{name} in .*{shard.name} is not what was written"
    ):
        convert(source, out, **CUT)
    assert not out.exists()


def test_an_input_that_changes_meanwhile(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, write = copied(dense, tmp_path / "in"), quantize._write

    def write_and_touch(*args: Any) -> None:
        write(*args)
        (source / "model.safetensors").touch()

    monkeypatch.setattr(quantize, "_write", write_and_touch)
    with pytest.raises(CheckpointError, match=r"/in was changed meanwhile: remove .*out\.partial"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_room_is_asked_for_when_a_run_goes_on(
    interrupted: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much as is missing, and no more."""
    source, out = interrupted
    total = sum(map(len, files(convert(source, out.with_name("whole"), **CUT)).values()))
    done = json.loads((partial(out) / "journal.json").read_text())["shards"].values()
    free = SimpleNamespace(free=total // 20)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    with pytest.raises(CheckpointError, match="GB free: make room there"):
        convert(source, out, **CUT)
    free.free = total - sum(shard["size"] for shard in done)
    consistency.check(Checkpoint.open(convert(source, out, **CUT)))


def test_an_output_that_appears_meanwhile(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, locked = tmp_path / "out", quantize.locked

    @contextmanager
    def locked_late(path: Path) -> Iterator[None]:
        with locked(path):  # the other run has just let go of it
            out.mkdir()
            (out / "config.json").write_text("another run's")
            yield

    monkeypatch.setattr(quantize, "locked", locked_late)
    with pytest.raises(CheckpointError, match="/out exists already: remove it, or name another"):
        convert(dense, out)
    assert files(out) == {"config.json": b"another run's"}


def test_the_output_is_checked_like_any_checkpoint(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = quantize._plan

    def plan_wrongly(*args: Any) -> Any:
        made = plan(*args)
        made.config["vocab_size"] += 1
        return made

    monkeypatch.setattr(quantize, "_plan", plan_wrongly)
    with pytest.raises(CheckpointError, match="vocab_size is 513, but 512 in the tensors"):
        convert(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()
