"""The CUDA kernels and their launchers on a CPU, emulated: the checks of a GPU without one.

Nothing here takes a GPU's time or its approximations into account; see cuda_on_cpu/__init__.py.
"""

import pytest
import torch

from tests.ops.cuda_cases import DTYPES, scan_case
from tests.ops.cuda_checks import (
    STRESS,
    check_backward,
    check_convolution,
    check_forward,
    check_norm,
    check_prompts,
    check_views,
)
from tests.ops.cuda_on_cpu.gpu import EmulatedGpu

LENGTHS = [1, 2, 3, 7, 8, 9, 63, 64, 65, 197]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_scan_is_right_at_every_length(
    length: int, dtype: torch.dtype, gpu: EmulatedGpu
) -> None:
    case = scan_case(2, length, 64, 16, 12, dtype, seed=length)
    gpu.multiprocessors = 1  # which the batch fills
    check_forward(case)
    check_backward(case)
    half = dtype != torch.float32
    assert set(gpu.launches) == {
        "scan_forward", "scan_backward_fast" if half else "scan_backward", "reduce_BC"
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [32, 37, 63, 64, 65, 197])
def test_the_scan_in_pieces_is_right_at_every_length(
    length: int, dtype: torch.dtype, gpu: EmulatedGpu
) -> None:
    check_forward(scan_case(2, length, 64, 16, 8, dtype, seed=length))
    assert set(gpu.launches) == {"scan_forward_chunked"}


SIZES = [(1, 2, 16, 2), (3, 5, 8, 3), (2, 33, 32, 4), (1, 34, 64, 7), (2, 160, 8, 48)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_every_size_is_right(
    size: tuple[int, int, int, int], dtype: torch.dtype, multiprocessors: int, gpu: EmulatedGpu
) -> None:
    gpu.multiprocessors = multiprocessors
    batch, channels, d_state, rank = size
    case = scan_case(batch, 37, channels, d_state, rank, dtype)
    check_forward(case)
    check_backward(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STRESS)
@pytest.mark.usefixtures("gpu")
def test_wide_ranges_keep_their_accuracy(name: str, dtype: torch.dtype) -> None:
    case = scan_case(1, 197, 64, 16, 8, dtype)
    STRESS[name](case)
    check_backward(case)


@pytest.mark.usefixtures("gpu")
def test_gradients_are_written_into_the_views_that_are_given() -> None:
    check_views("cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [(False,), (True,), (False, True)])
@pytest.mark.parametrize("shape", [(2, 1, 8), (1, 3, 5), (3, 65, 34)])
@pytest.mark.usefixtures("gpu")
def test_the_convolution_is_right(
    shape: tuple[int, int, int], reverse: tuple[bool, ...], dtype: torch.dtype
) -> None:
    check_convolution(shape, reverse, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["first block", "later block"])
@pytest.mark.parametrize("width", [1, 13, 192])
@pytest.mark.usefixtures("gpu")
def test_the_norms_are_right(width: int, first: bool, rms: bool, dtype: torch.dtype) -> None:
    check_norm((2, 7, width), first, rms, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 48, 192])
@pytest.mark.parametrize("skip", [(), (0, 10)])
@pytest.mark.usefixtures("gpu")
def test_the_prompts_are_right(skip: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    check_prompts(skip, width, dtype, "cpu")
