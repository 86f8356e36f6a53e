"""Backend `triton` on a machine without a GPU: interpreted, compiled, and refused."""

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from svp_peft.errors import BackendError
from svp_peft.ops import backends, triton
from tests.ops.cuda_cases import scan_case

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(autouse=True)
def _nothing_remembered():
    yield
    triton._missing.cache_clear()
    triton._too_old.cache_clear()


@needs_triton
@pytest.mark.parametrize("family", ["scan", "conv or norm or prompt"])
def test_kernels_are_right_under_the_interpreter(family: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # xdist's variables would make the inner run believe that it is a worker
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}
    arguments = ["-q", "-x", "-p", "no:cacheprovider", "-k", family, "triton_small.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=HERE,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@needs_triton
@pytest.mark.parametrize("architecture", [80, 90])
def test_kernels_compile_without_a_gpu(architecture: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.triton_compile", str(architecture)],
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = set(done.stdout.split())
    sources = Path(triton.__file__).parent.glob("*.py")
    kernels = {
        line.split("(")[0].removeprefix("def ")
        for source in sources
        for line in source.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    assert compiled == kernels


def test_importing_the_backend_does_not_import_triton() -> None:
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import svp_peft.ops.triton as t; "
        "t.unavailable(torch.device('cpu')); print(before or 'triton' not in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'mixer'"):
        triton.mixer  # noqa: B018


def test_a_cpu_is_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match=r"(tensors are on cpu|Triton is not installed)"):
        backends.choose("triton", torch.device("cpu"), torch.float32)


def test_a_missing_triton_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    triton._missing.cache_clear()
    assert "pip install triton" in triton.unavailable(torch.device("cuda"))


def test_an_old_triton_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(metadata, "version", lambda _: "2.3.1")
    triton._missing.cache_clear()
    reason = triton.unavailable(torch.device("cuda"))
    assert "Triton 2.3.1 is older than 3.0" in reason
    assert "pip install -U torch" in reason


@needs_triton
@pytest.mark.parametrize(("capability", "works"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_an_old_gpu_is_refused(
    capability: tuple[int, int], works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    reason = triton.unavailable(torch.device("cuda", 0))
    assert (reason is None) == works
    assert works or "compute capability 7.5" in reason


def test_a_machine_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(triton, "_missing", lambda: None, raising=True)
    assert "torch finds no GPU" in triton.unavailable(torch.device("cuda", 0))


@needs_triton
@pytest.mark.parametrize(
    ("x", "stride"),
    [
        (torch.zeros(2, 3, 4), 4),
        (torch.zeros(2, 3, 8)[..., 4:], 8),
        (torch.zeros(2, 1, 8)[..., 4:], 8),
        (torch.zeros(1, 3, 8)[..., 4:], 8),
        (torch.zeros(1, 1, 8)[..., 4:], 4),
        (torch.zeros(4, 3, 4)[::2], None),
        (torch.zeros(2, 4, 3).transpose(1, 2), None),
        (torch.zeros(3, 2, 4).transpose(0, 1), None),
        (torch.zeros(1, 1, 4).expand(2, 3, 4), 0),
        (torch.zeros(2, 1, 4).expand(2, 3, 4), None),
    ],
    ids=str,
)
def test_a_row_stride_addresses_every_token(x: torch.Tensor, stride: int | None) -> None:
    from svp_peft.ops.triton.launch import row_stride, with_rows

    assert row_stride(x) == stride
    same, found = with_rows(x)
    batch, length, width = x.shape
    for index in range(batch * length):
        expected = same.storage_offset() + index * found
        assert same[index // length, index % length].storage_offset() == expected
    assert found in (stride, width)


def test_cases_have_the_layout_of_the_mixer() -> None:
    _, dt, B, C, z, *_ = scan_case(2, 3, 8, 4, 2).arguments
    assert dt[0].data_ptr() != B[0].data_ptr()
    assert {t.stride(1) for t in (*dt, *B, *C)} == {2 + 8}
    assert z.stride(1) == 16
