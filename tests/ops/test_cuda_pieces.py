"""Long sequences of few images are scanned in pieces; here by the emulated GPU."""

import importlib
from typing import Any

import pytest
import torch

from tests.ops.cuda_cases import scan_case
from tests.ops.cuda_checks import STRESS, check_forward
from tests.ops.cuda_on_cpu.gpu import EmulatedGpu

scan = importlib.import_module("svp_peft.ops.cuda.scan")


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of 16 tokens are long, pieces of 8 long enough."""
    monkeypatch.setattr(scan, "_chunked", lambda *_: None)
    monkeypatch.setattr(scan, "_LONG", 16)
    monkeypatch.setattr(scan, "_SHORTEST_PIECE", 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [17, 37, 64])
@pytest.mark.usefixtures("short_pieces")
def test_pieces_are_right_at_every_length(
    length: int, dtype: torch.dtype, gpu: EmulatedGpu
) -> None:
    check_forward(scan_case(2, length, 64, 16, 8, dtype, seed=length))
    # without and with y, two launches each
    assert gpu.launches == ["scan_forward"] * 4


OPTIONS: list[dict[str, Any]] = [
    {"directions": 1},
    {"directions": 1, "backwards": True},
    {"backwards": True, "parameter_dtype": torch.bfloat16},
    {"gate": False, "skip": False, "bias": False},
    {"a_is_log": False, "low_rank": False, "softplus": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.usefixtures("short_pieces", "gpu")
def test_pieces_are_right_with_every_option(options: dict[str, Any]) -> None:
    check_forward(scan_case(1, 37, 34, 8, 4, torch.bfloat16, **options))


@pytest.mark.usefixtures("short_pieces", "gpu")
def test_pieces_keep_their_accuracy_after_a_token_1000_times_larger() -> None:
    case = scan_case(1, 64, 32, 16, 8, torch.float32)
    STRESS["one token 1000 times larger"](case)
    check_forward(case)


def test_an_image_of_448_pixels_is_cut_into_pieces(gpu: EmulatedGpu) -> None:
    check_forward(scan_case(1, 785, 32, 8, 8, torch.bfloat16))
    assert gpu.launches == ["scan_forward"] * 4


def test_a_batch_that_fills_the_gpu_is_not(gpu: EmulatedGpu) -> None:
    gpu.multiprocessors = 1
    check_forward(scan_case(3, 513, 32, 8, 8, torch.bfloat16))
    assert gpu.launches == ["scan_forward"] * 2
