"""The CUDA kernels and their launchers on a CPU, emulated: the checks of a GPU without one.

Nothing here takes a GPU's time or its approximations into account; see cuda_on_cpu/__init__.py.
"""

from typing import Any

import pytest
import torch

from svp_peft.ops import backends
from svp_peft.ops.cuda import stack_kernels
from svp_peft.ops.cuda.stack_kernels import StackKernels
from svp_peft.ops.types import Cache, FrozenBlock, PromptWeights
from tests.ops.cuda_cases import DTYPES, EVERY_GRADIENT, scan_case
from tests.ops.cuda_checks import (
    STRESS,
    backward,
    check_backward,
    check_convolution,
    check_forward,
    check_grouped_prompts,
    check_norm,
    check_prompt_up_norm,
    check_prompts,
    check_views,
)
from tests.ops.cuda_on_cpu.emulator import ORDERS
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_right(
    size: tuple[int, int, int, int], dtype: torch.dtype, gpu: EmulatedGpu
) -> None:
    batch, channels, d_state, rank = size
    case = scan_case(batch, 37, channels, d_state, rank, dtype)
    check_forward(case, alone=False)
    check_backward(case)
    gpu.multiprocessors = 1
    check_forward(scan_case(3 * batch, 37, channels, d_state, rank, dtype), alone=False)
    assert gpu.launches[-1] == "scan_forward"


OPTIONS: list[dict[str, Any]] = [
    {"directions": 1},
    {"directions": 1, "backwards": True},
    {"backwards": True, "parameter_dtype": torch.bfloat16},
    {"gate": False},
    {"skip": False, "bias": False},
    {"softplus": False},
    {"a_is_log": False},
    {"low_rank": False},
    {"low_rank": False, "bias": False, "gate": False, "skip": False, "directions": 1},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_is_right(
    options: dict[str, Any], dtype: torch.dtype, gpu: EmulatedGpu
) -> None:
    gpu.multiprocessors = 1
    case = scan_case(2, 21, 64, 16, 4, dtype, **options)
    check_forward(case, alone=False)
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


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_in_which_threads_run_does_not_matter(
    dtype: torch.dtype, order: str, gpu: EmulatedGpu
) -> None:
    case = scan_case(2, 37, 64, 16, 8, dtype)
    expected = backward(case, EVERY_GRADIENT)
    gpu.order = order
    for a, b in zip(expected, backward(case, EVERY_GRADIENT), strict=True):
        flat = [x if isinstance(x, tuple) else (x,) for x in (a, b)]
        assert all(torch.equal(x, y) for x, y in zip(*flat, strict=True))
    check_forward(case)
    gpu.multiprocessors = 1
    check_forward(case)


@pytest.mark.parametrize("reverse", [(False,), (True,), (False, True)])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 1, 8), torch.float32),
        ((1, 3, 5), torch.bfloat16),
        ((3, 65, 34), torch.float32),
        ((3, 65, 34), torch.bfloat16),
        ((2, 63, 8), torch.float16),
    ],
    ids=str,
)
@pytest.mark.usefixtures("gpu")
def test_the_convolution_is_right(
    shape: tuple[int, int, int], reverse: tuple[bool, ...], dtype: torch.dtype
) -> None:
    check_convolution(shape, reverse, dtype, "cpu")


@pytest.mark.parametrize(
    ("width", "first", "rms", "dropping", "dtype"),
    [
        (1, True, True, False, torch.float32),
        (13, False, False, False, torch.bfloat16),
        (13, True, False, True, torch.float16),
        (192, False, True, False, torch.float32),
        (192, False, False, True, torch.float32),
        (200, False, True, True, torch.float16),
    ],
    ids=str,
)
@pytest.mark.usefixtures("gpu")
def test_the_norms_are_right(
    width: int, first: bool, rms: bool, dropping: bool, dtype: torch.dtype
) -> None:
    check_norm((2, 7, width), first, rms, dtype, "cpu", dropping)


@pytest.mark.parametrize(
    ("shape", "bottleneck", "rms", "dropping", "dtype"),
    [
        ((1, 1, 64), 8, True, False, torch.bfloat16),
        ((3, 11, 96), 24, False, True, torch.float16),
        ((2, 31, 200), 40, True, True, torch.bfloat16),
        ((1, 16, 192), 128, False, False, torch.bfloat16),
        ((5, 13, 384), 64, True, False, torch.bfloat16),
        ((3, 17, 768), 64, False, True, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("keep", [False, True], ids=["", "keep"])
def test_the_inner_prompt_made_where_it_is_added_is_right(
    shape: tuple[int, int, int],
    bottleneck: int,
    rms: bool,
    dropping: bool,
    dtype: torch.dtype,
    keep: bool,
    gpu: EmulatedGpu,
) -> None:
    gpu.multiprocessors = 1  # a block takes several tiles
    check_prompt_up_norm(shape, bottleneck, rms, dtype, "cpu", dropping, keep)
    assert "prompt_up_norm_forward" in gpu.launches


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("warps", [4, 8])
def test_the_warps_that_make_the_inner_prompt_may_run_in_any_order(
    warps: int, order: str, gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack_kernels, "_TILE_WARPS", warps)
    gpu.order, gpu.multiprocessors = order, 1
    check_prompt_up_norm((3, 37, 128), 16, True, torch.bfloat16, "cpu")


@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.usefixtures("gpu")
def test_the_inner_prompt_is_right_beside_a_weight_at_an_odd_address(shift: int) -> None:
    check_prompt_up_norm((2, 9, 72), 16, True, torch.bfloat16, "cpu", shift=shift)


def test_prompters_too_large_for_shared_memory_are_not_made_there(gpu: EmulatedGpu) -> None:
    """U of 768 x 128 halves beside its tiles takes 237 KiB, and an H100 gives 227."""
    row = torch.ones(768)
    for bottleneck, served in ((64, True), (112, True), (128, False), (136, False)):
        projections = (torch.ones(768, 768), row, torch.ones(bottleneck, 768), row[:bottleneck],
                       torch.ones(768, bottleneck), row)  # fmt: skip
        prompt = PromptWeights(projections, row[None], 0, row[None], 0, ())
        without_mixer: Any = None
        block = FrozenBlock(without_mixer, Cache(), 1.0, row, None, 1e-5, True, 0.0, prompt)
        x = torch.ones(1, 2, 768)
        assert StackKernels(x.bfloat16(), x, [block]).has_prompt_up_norm == served
    assert not gpu.launches


@pytest.mark.parametrize(
    ("width", "dtype", "skip"),
    [
        (3, torch.float32, (0, 10)),
        (48, torch.bfloat16, ()),
        (64, torch.float16, (5,)),
        (1031, torch.float32, ()),  # more columns than a block has threads
    ],
    ids=str,
)
@pytest.mark.usefixtures("gpu")
def test_the_prompts_are_right(width: int, dtype: torch.dtype, skip: tuple[int, ...]) -> None:
    check_prompts(skip, width, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("repeat", "width"), [(1, 24), (2, 13)])
def test_prompts_of_several_adapters_are_right(
    repeat: int, width: int, dtype: torch.dtype, gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_default", "cuda")
    check_grouped_prompts(repeat, width, dtype, "cpu")
    assert gpu.launches == ["prompt_rows"]
