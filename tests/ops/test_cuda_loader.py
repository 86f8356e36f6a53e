"""Finding the compiler, and compiled kernels on disk: none of it needs a GPU."""

import logging
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svp_peft.errors import BackendError
from svp_peft.ops import cuda
from svp_peft.ops.cuda import disk_cache, kernels
from svp_peft.ops.cuda.nvrtc import Nvrtc, find_nvrtc

_MACROS = {"ACT": "float", "D_STATE": 16, "DIRECTIONS": 1, "NEED_B": True, "NEED_C": True}
_LAYOUT = "2Q2Q2Q4i"


@pytest.fixture
def nvrtc() -> Nvrtc:
    found = find_nvrtc()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SVP_PEFT_CACHE", str(tmp_path))
    return tmp_path / "cuda"


def _build(nvrtc: Nvrtc, target: str = "sm_80", driver: int = 13000) -> bytes:
    return kernels.build(nvrtc, "reduce", _MACROS, _LAYOUT, target, driver)


class _Refusing:
    """An NVRTC that fails the test when it is asked to compile."""

    def __init__(self, nvrtc: Nvrtc) -> None:
        self.version, self.path = nvrtc.version, nvrtc.path

    def compile(self, *_: object) -> bytes:
        raise AssertionError("compiled again although it is on disk")


def test_a_kernel_is_compiled_once_and_then_read_from_disk(nvrtc: Nvrtc, cache: Path) -> None:
    first = _build(nvrtc)
    assert len(list(cache.iterdir())) == 1
    assert _build(_Refusing(nvrtc)) == first  # type: ignore[arg-type]


def test_another_target_driver_or_source_is_another_file(
    nvrtc: Nvrtc, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _build(nvrtc)
    _build(nvrtc, target="sm_90")
    _build(nvrtc, driver=12040)
    assert len(list(cache.iterdir())) == 3
    original = kernels._text
    monkeypatch.setattr(kernels, "_text", lambda name: original(name) + "// changed\n")
    _build(nvrtc)
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("damage", [b"", b"svp_peft cubin 1\n", b"\x00" * 5000])
def test_a_damaged_file_is_compiled_again(
    nvrtc: Nvrtc, cache: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    intact = _build(nvrtc)
    (path,) = cache.iterdir()
    path.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert _build(nvrtc) == intact
    assert "damaged" in caplog.text
    assert _build(_Refusing(nvrtc)) == intact  # type: ignore[arg-type]


def test_one_flipped_bit_is_noticed(nvrtc: Nvrtc, cache: Path) -> None:
    intact = _build(nvrtc)
    (path,) = cache.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert _build(nvrtc) == intact


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(
    nvrtc: Nvrtc, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.mkdir(parents=True)
    cache.chmod(stat.S_IRUSR | stat.S_IXUSR)

    def refuse(**_: object) -> tuple[int, str]:  # root writes anywhere, whatever the mode says
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(disk_cache.tempfile, "mkstemp", refuse)
    with caplog.at_level(logging.WARNING):
        assert _build(nvrtc)[:4] == b"\x7fELF"
        assert _build(nvrtc)[:4] == b"\x7fELF"
    assert caplog.text.count("SVP_PEFT_CACHE") == 1
    assert list(cache.iterdir()) == []


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVP_PEFT_CACHE", "/somewhere")
    assert disk_cache.cache_folder() == Path("/somewhere/cuda")
    monkeypatch.delenv("SVP_PEFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert disk_cache.cache_folder() == Path("/xdg/svp_peft/cuda")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert disk_cache.cache_folder() == Path("/home/someone/.cache/svp_peft/cuda")


def test_a_user_without_a_home_compiles_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("SVP_PEFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    disk_cache.write("key", b"payload")
    assert disk_cache.read("key") is None


def test_processes_that_start_together_agree(nvrtc: Nvrtc, cache: Path) -> None:
    program = (
        "import sys, hashlib;"
        "from svp_peft.ops.cuda import kernels;"
        "from svp_peft.ops.cuda.nvrtc import find_nvrtc;"
        f"image = kernels.build(find_nvrtc(), 'reduce', {_MACROS!r}, {_LAYOUT!r}, 'sm_80', 13000);"
        "print(hashlib.sha256(image).hexdigest())"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    digests = {process.communicate(timeout=120)[0].strip() for process in running}
    assert all(process.returncode == 0 for process in running)
    assert len(digests) == 1
    assert [p.name for p in cache.iterdir() if p.name.startswith(".")] == []
    assert len(list(cache.iterdir())) == 1


def test_a_source_that_does_not_compile_says_what_the_compiler_said(nvrtc: Nvrtc) -> None:
    with pytest.raises(BackendError, match='identifier "nothing" is undefined'):
        nvrtc.compile("int x = nothing;", "broken.cu", {}, ("--gpu-architecture=sm_80",))


def test_a_gpu_newer_than_the_compiler_gets_ptx(nvrtc: Nvrtc) -> None:
    assert nvrtc.target((9, 0)) == "sm_90"
    assert nvrtc.target((99, 0)).startswith("compute_")
    ptx = nvrtc.compile("__global__ void f() {}", "f", {}, ("--gpu-architecture=compute_80",))
    assert b".target sm_80" in ptx


def test_a_gpu_older_than_the_compiler_is_refused_in_words(nvrtc: Nvrtc) -> None:
    with pytest.raises(BackendError, match="backend='triton'"):
        nvrtc.target((3, 5))


def test_long_compilation_is_announced_once(
    nvrtc: Nvrtc,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(kernels._progress, "spent", 100.0)
    monkeypatch.setattr(kernels._progress, "told", False)
    with caplog.at_level(logging.WARNING):
        _build(nvrtc)
        _build(nvrtc, target="sm_90")
    assert caplog.text.count("keeps them in") == 1


def test_a_cpu_tensor_is_told_that_a_gpu_is_missing() -> None:
    reason = cuda.unavailable(torch.device("cpu"))
    assert reason is not None
    assert "NVIDIA GPU" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_reason_says_so() -> None:
    assert "no NVIDIA GPU" in (cuda.unavailable(torch.device("cuda")) or "")


def test_importing_the_backend_searches_for_nothing() -> None:
    program = (
        "import sys, svp_peft.ops.cuda;"
        "from svp_peft.ops.cuda.nvrtc import find_nvrtc;"
        "from svp_peft.ops.cuda.driver import find_driver;"
        "searched = find_nvrtc.cache_info().misses + find_driver.cache_info().misses;"
        "sys.exit(searched or 'triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
