"""How the C++ kernels are built: locks, and every tool that can be missing or broken."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from svp_peft.errors import BackendError
from svp_peft.ops import backends, cpu
from svp_peft.ops.cpu import loader
from tests.ops.cpu_builds import (
    CPU,
    Forked,
    assert_built,
    assert_falls_back,
    compilations,
    counting_compiler,
    environment,
    executable,
    needs_compiler,
    run,
    write_source,
)

ROOT = Path(__file__).parents[2]

pytestmark = needs_compiler


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_source(tmp_path / "csrc")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with csrc, a compiler (counting-c++), and a cache that holds their build."""
    folder = tmp_path_factory.mktemp("finished")
    sources = write_source(folder / "csrc")
    env = environment(folder / "cache", CXX=str(counting_compiler(folder)))
    assert_built(run(sources, env), folder / "cache" / "cpu")
    assert compilations(folder) == 1
    return folder


COLD = """
import json
from tests.ops.cpu_builds import first_use
print(json.dumps(first_use()))
"""


def test_three_processes_at_once_build_the_kernels_once_and_in_silence(tmp_path: Path) -> None:
    def files() -> set[Path]:
        return {p for p in (ROOT / "svp_peft").rglob("*") if "__pycache__" not in p.parts}

    before = files()
    # a warning would be an error: importing this module already asks whether the kernels are there
    env = environment(tmp_path / "cache", CXX=str(counting_compiler(tmp_path)))
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error::RuntimeWarning", "-c", COLD],
            env=env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in started:
        out, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
        assert err == ""
        assert_built(json.loads(out), tmp_path / "cache" / "cpu")
    assert compilations(tmp_path) == len(list(loader.SOURCES.glob("*.cpp")))
    # what is left: the library and its lock
    assert sorted(p.suffix for p in (tmp_path / "cache" / "cpu").iterdir()) == [".lock", ".so"]
    assert files() == before


def test_a_later_process_finds_the_build_even_where_it_may_not_write(finished: Path) -> None:
    count = compilations(finished)
    env = environment(finished / "cache", CXX=str(finished / "counting-c++"))
    for path in (finished / "cache" / "cpu", finished / "cache"):
        path.chmod(0o555)
    try:
        result = run(finished / "csrc", env)
    finally:
        for path in (finished / "cache", finished / "cache" / "cpu"):
            path.chmod(0o755)
    assert_built(result, finished / "cache")
    assert compilations(finished) == count


def test_another_source_or_compiler_is_another_build(finished: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(finished / "cache", cache)
    other = executable(tmp_path / "other-c++", 'exec c++ "$@"\n')
    run(finished / "csrc", environment(cache, CXX=str(other)))
    assert len(list((cache / "cpu").glob("*.so"))) == 2
    sources = write_source(tmp_path / "csrc", 'extern "C" int svp_one() { return 2; }\n')
    run(sources, environment(cache, CXX=str(other)))
    assert len(list((cache / "cpu").glob("*.so"))) == 3


def test_a_damaged_library_is_built_again(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "cache", tmp_path / "cache")
    library = next((tmp_path / "cache" / "cpu").glob("*.so"))
    whole = library.read_bytes()
    library.write_bytes(whole[:100])
    env = environment(tmp_path / "cache", CXX=str(finished / "counting-c++"))
    assert_built(run(finished / "csrc", env), tmp_path / "cache")
    assert len(library.read_bytes()) == len(whole)


def test_a_build_that_was_killed_holds_nobody_up(tmp_path: Path, tiny: Path) -> None:
    compiler = str(counting_compiler(tmp_path))
    killed = Forked(tiny, environment(tmp_path / "cache", CXX=compiler, SVP_TEST_WAIT="120"))
    deadline = time.monotonic() + 120
    while compilations(tmp_path) == 0:
        assert time.monotonic() < deadline
        assert killed.process.is_alive()
        time.sleep(0.05)
    os.killpg(killed.process.pid, signal.SIGKILL)
    killed.process.join()
    assert_built(run(tiny, environment(tmp_path / "cache", CXX=compiler)), tmp_path / "cache")
    # what the dead build left is removed a day later
    abandoned = next((tmp_path / "cache" / "cpu").glob("build-*"))
    loader._remove_abandoned(abandoned.parent)
    assert abandoned.exists()
    os.utime(abandoned, (0, 0))
    loader._remove_abandoned(abandoned.parent)
    assert not abandoned.exists()


def test_svp_peft_cpu_0_turns_the_kernels_off_without_a_word(tmp_path: Path, tiny: Path) -> None:
    result = run(tiny, environment(tmp_path / "cache", SVP_PEFT_CPU="0"))
    assert result["chosen"] == "reference"
    assert result["warnings"] == []
    assert "SVP_PEFT_CPU=0" in result["reason"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("command", ["no-such-compiler --flag", '"unfinished', ""])
def test_a_missing_compiler_is_one_warning_that_says_what_to_install(
    tmp_path: Path, tiny: Path, command: str
) -> None:
    result = run(tiny, environment(tmp_path / "cache", CXX=command))
    assert_falls_back(result, f"no C++ compiler {command!r}", "apt install g++")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            'case "$*" in *" -c "*) echo "fatal error: cannot go on"; exit 1;; esac\n'
            'exec c++ "$@"\n',
            "fatal error: cannot go on",
        ),
        # says that it worked and leaves nothing
        ("exit 0\n", "does not compile them"),
    ],
    ids=["talking", "lying"],
)
def test_a_broken_compiler_is_one_warning_that_quotes_it(
    tmp_path: Path, tiny: Path, body: str, words: str
) -> None:
    broken = executable(tmp_path / "broken-c++", body)
    result = run(tiny, environment(tmp_path / "cache", CXX=str(broken)))
    assert_falls_back(result, str(broken), words, "apt install g++")
    assert [p.suffix for p in (tmp_path / "cache" / "cpu").iterdir()] == [".lock"]


def test_a_source_that_does_not_compile_names_its_first_error(tmp_path: Path, tiny: Path) -> None:
    (tiny / "one.cpp").write_text("int broken() { return nothing; }\n")
    result = run(tiny, environment(tmp_path / "cache"))
    assert_falls_back(result, "one.cpp:1:", "'nothing'")


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path) -> None:
    """The loader as in a fresh process with an empty cache."""
    monkeypatch.setattr(loader, "_library", None)
    monkeypatch.setattr(loader, "_reason", None)
    monkeypatch.setattr(loader, "SOURCES", tiny)
    monkeypatch.setenv("SVP_PEFT_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("unloaded")
def test_a_missing_ninja_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = loader.shutil.which

    def which(name: str, **options: str) -> str | None:
        return None if name == "ninja" else found(name, **options)

    monkeypatch.setattr(loader.shutil, "which", which)
    with pytest.warns(RuntimeWarning, match="pip install ninja"):
        assert "ninja is missing" in cpu.unavailable(CPU)


@pytest.mark.usefixtures("unloaded")
def test_a_torch_without_headers_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    with pytest.warns(RuntimeWarning, match="this torch has no C"):
        assert "Install torch from its wheel" in cpu.unavailable(CPU)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("setup", "words"),
    [
        (lambda patch: patch.setattr(sys, "platform", "win32"), "Linux and macOS only"),
        (lambda patch: patch.setattr(sys, "executable", "/no/python"), "did not run"),
        (lambda patch: patch.setattr(loader, "_PATIENCE", 1e-3), "did not run"),
    ],
    ids=["windows", "no interpreter", "no end"],
)
def test_other_reasons_are_named(
    monkeypatch: pytest.MonkeyPatch, setup: Callable[[pytest.MonkeyPatch], None], words: str
) -> None:
    setup(monkeypatch)
    with pytest.warns(RuntimeWarning, match=words):
        assert words in cpu.unavailable(CPU)


@pytest.mark.usefixtures("unloaded")
def test_naming_the_backend_raises_the_reason_where_auto_falls_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match="no C"):
        assert backends.choose("auto", CPU, torch.float32) == "reference"
    with pytest.raises(BackendError, match="apt install g"):
        backends.choose("cpu", CPU, torch.float32)
    with pytest.raises(RuntimeError, match="not loaded"):
        loader.loaded()


def test_the_flags_follow_the_instruction_set_that_pytorch_uses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader.platform, "machine", lambda: "x86_64")
    for capability, flag in (("AVX512", "-mavx512f"), ("AVX2", "-mavx2"), ("DEFAULT", None)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        flags = loader.target_flags()
        assert flag in flags if flag else flags == []
    monkeypatch.setattr(loader.platform, "machine", lambda: "arm64")
    assert loader.target_flags() == []
