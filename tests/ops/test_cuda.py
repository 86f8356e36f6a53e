"""The CUDA kernels against the reference in float64, on a GPU.

Outputs are NaN before each kernel runs (torch fills fresh memory so in deterministic mode), so an
element that nobody writes fails. Bounds: see cuda_checks.py.
"""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from svp_peft.errors import BackendError
from svp_peft.ops import cuda
from svp_peft.ops.types import ScanGrads, ScanNeeds
from tests.ops.cuda_cases import DTYPES, EVERY_GRADIENT, error, scan_case, scan_truth
from tests.ops.cuda_checks import (
    GRADIENT_BOUND,
    OUTPUT_BOUND,
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

pytestmark = pytest.mark.gpu

_scan_module = importlib.import_module("svp_peft.ops.cuda.scan")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["streaming", "chunked"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "streaming":
        monkeypatch.setattr(_scan_module, "_chunked", lambda *_: None)
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 63, 64, 65, 196, 197, 785, 3137])
def test_the_forward_scan_is_right_at_every_length(
    length: int, dtype: torch.dtype, form: str
) -> None:
    check_forward(scan_case(2, length, 64, 16, 12, dtype, "cuda", seed=length))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 63, 64, 65, 196, 197, 785, 3137])
def test_every_gradient_is_right_at_every_length(length: int, dtype: torch.dtype) -> None:
    check_backward(scan_case(2, length, 64, 16, 12, dtype, "cuda", seed=length))


SIZES = [
    (1, 2, 16, 2),
    (3, 5, 8, 3),
    (2, 33, 32, 4),
    (1, 130, 64, 7),
    (2, 96, 64, 24),
    (2, 160, 8, 48),
    (1, 384, 16, 12),
    (2, 64, 32, 70),
    (8, 256, 16, 16),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_right(
    size: tuple[int, int, int, int], dtype: torch.dtype, form: str
) -> None:
    batch, channels, d_state, rank = size
    case = scan_case(batch, 37, channels, d_state, rank, dtype, "cuda")
    check_forward(case)
    check_backward(case)


@pytest.mark.parametrize("batch", [1, 4, 128])
def test_every_batch_size_is_right(batch: int) -> None:
    case = scan_case(batch, 19, 32, 16, 4, torch.bfloat16, "cuda")
    check_forward(case)
    check_backward(case)


OPTIONS: list[dict[str, Any]] = [
    {"directions": 1},
    {"directions": 1, "backwards": True},
    {"backwards": True},
    {"gate": False},
    {"skip": False},
    {"bias": False},
    {"softplus": False},
    {"a_is_log": False},
    {"low_rank": False},
    {"low_rank": False, "bias": False, "gate": False, "skip": False, "directions": 1},
    {"parameter_dtype": torch.bfloat16},
    {"parameter_dtype": torch.float64},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_is_right(options: dict[str, Any], dtype: torch.dtype, form: str) -> None:
    case = scan_case(2, 50, 64, 16, 4, dtype, "cuda", **options)
    check_forward(case)
    check_backward(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ScanNeeds._fields)
def test_each_gradient_alone_is_the_same_as_among_all(name: str, dtype: torch.dtype) -> None:
    case = scan_case(2, 30, 64, 16, 4, dtype, "cuda")
    everything = backward(case, EVERY_GRADIENT)
    one = ScanNeeds(*(field == name for field in ScanNeeds._fields))
    alone = backward(case, one)
    for field in ScanGrads._fields:
        if field != "d" + name:
            assert getattr(alone, field) is None, field
            continue
        pairs = (getattr(alone, field), getattr(everything, field))
        flat = [x if isinstance(x, tuple) else (x,) for x in pairs]
        for a, b in zip(*flat, strict=True):
            # those of the parameters restart the sums of d dt at every tile: other last bits
            assert error(a, b.double()) < 0.2 * GRADIENT_BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    case = scan_case(8, 197, 128, 16, 8, dtype, "cuda")
    for first, second in zip(
        backward(case, EVERY_GRADIENT), backward(case, EVERY_GRADIENT), strict=True
    ):
        flat = [x if isinstance(x, tuple) else (x,) for x in (first, second)]
        for a, b in zip(*flat, strict=True):
            assert torch.equal(a, b)


def test_gradients_are_written_into_the_views_that_are_given() -> None:
    check_views("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", STRESS)
def test_wide_ranges_keep_their_accuracy(name: str, dtype: torch.dtype) -> None:
    case = scan_case(2, 197, 64, 16, 8, dtype, "cuda")
    STRESS[name](case)
    check_backward(case, ScanNeeds())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [(False,), (True,), (False, True)])
@pytest.mark.parametrize("shape", [(2, 1, 8), (1, 3, 5), (3, 197, 96), (2, 785, 34)])
def test_the_convolution_is_right(
    shape: tuple[int, int, int], reverse: tuple[bool, ...], dtype: torch.dtype
) -> None:
    check_convolution(shape, reverse, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["first block", "later block"])
@pytest.mark.parametrize("width", [1, 13, 192, 384, 768, 1100])
def test_the_norms_are_right(width: int, first: bool, rms: bool, dtype: torch.dtype) -> None:
    check_norm((3, 50, width), first, rms, dtype, "cuda")


@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("width", "bottleneck"), [(64, 8), (192, 64), (384, 24), (384, 64), (384, 128), (768, 64)]
)
def test_the_inner_prompt_made_where_it_is_added_is_right(
    width: int, bottleneck: int, dtype: torch.dtype, rms: bool, dropping: bool
) -> None:
    for batch, length in ((1, 1), (3, 197), (33, 197)):
        check_prompt_up_norm((batch, length, width), bottleneck, rms, dtype, "cuda", dropping)
        check_prompt_up_norm(
            (batch, length, width), bottleneck, rms, dtype, "cuda", dropping, keep=False
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 48, 192, 384, 768, 1280])
@pytest.mark.parametrize("skip", [(), (5,), (0, 10)])
def test_the_prompts_are_right(skip: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    check_prompts(skip, width, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("repeat", "width"), [(1, 24), (2, 13), (1, 384)])
def test_prompts_of_several_adapters_are_right(repeat: int, width: int, dtype: torch.dtype) -> None:
    check_grouped_prompts(repeat, width, dtype, "cuda")


def test_a_kernel_first_needed_inside_a_graph_says_what_to_do() -> None:
    case = scan_case(1, 6, 32, 16, 5, torch.float16, "cuda", gate=False)
    _scan_module._streaming_kernel.cache_clear()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with pytest.raises(BackendError, match="Run the same step once before"):
        with torch.cuda.graph(graph):
            cuda.scan(*case.arguments, **case.options, save_y=False)


def test_a_captured_scan_replays_on_new_inputs() -> None:
    case = scan_case(2, 40, 64, 16, 8, torch.bfloat16, "cuda")
    cuda.scan(*case.arguments, **case.options, save_y=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = cuda.scan(*case.arguments, **case.options, save_y=False)
    case.arguments[0][0].normal_()
    graph.replay()
    again, _ = cuda.scan(*case.arguments, **case.options, save_y=False)
    assert torch.equal(out, again)


def test_a_side_stream_is_respected() -> None:
    case = scan_case(2, 40, 64, 16, 8, torch.bfloat16, "cuda")
    expected, _ = cuda.scan(*case.arguments, **case.options, save_y=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = case.arguments[0][0].clone()
        arguments = ((late, case.arguments[0][1]), *case.arguments[1:])
        out, _ = cuda.scan(*arguments, **case.options, save_y=False)
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_works_while_the_first_is_current() -> None:
    case = scan_case(2, 40, 64, 16, 8, torch.bfloat16, "cuda:1")
    out, _ = cuda.scan(*case.arguments, **case.options, save_y=False)
    assert error(out, scan_truth(case)[0]) < OUTPUT_BOUND[torch.bfloat16]


def test_empty_batches_are_no_error() -> None:
    case = scan_case(0, 5, 32, 16, 4, torch.float32, "cuda")
    out, _ = cuda.scan(*case.arguments, **case.options, save_y=True)
    assert out.shape == (0, 5, 32)
    assert backward(case, EVERY_GRADIENT).dA[0].abs().sum() == 0
