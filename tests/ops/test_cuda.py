"""The CUDA kernels against the reference in float64, on a GPU.

Outputs are NaN before each kernel runs (torch fills fresh memory so in deterministic mode), so an
element that nobody writes fails. Bounds on ||found - truth|| / ||truth||:

    float32   the special function unit's exp has 2 ulp (2e-7), and recurrences add such errors up
    bfloat16  one rounding of a result is 1.7e-3; y of the first half of a sequence is rounded too
    float16   an eighth of bfloat16's
"""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from svp_peft.errors import BackendError
from svp_peft.ops import cuda, reference
from svp_peft.ops.types import ScanGrads, ScanNeeds
from tests.ops.cuda_cases import (
    DTYPES,
    EVERY_GRADIENT,
    Case,
    error,
    map_tensors,
    scan_case,
    scan_truth,
)

pytestmark = pytest.mark.gpu

_scan_module = importlib.import_module("svp_peft.ops.cuda.scan")

OUTPUT_BOUND = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
GRADIENT_BOUND = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 8e-4}


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


def check_forward(case: Case) -> None:
    out, y = cuda.scan(*case.arguments, **case.options, save_y=True)
    true_out, true_y, _ = scan_truth(case)
    bound = OUTPUT_BOUND[out.dtype]
    assert y is not None
    assert error(out, true_out) < bound
    assert error(y, true_y) < bound
    alone, nothing = cuda.scan(*case.arguments, **case.options, save_y=False)
    assert nothing is None
    assert torch.equal(alone, out)


def backward(case: Case, need: ScanNeeds, y: Tensor | None = None) -> ScanGrads:
    first, rest = case.arguments[:5], case.arguments[5:]
    return cuda.scan_backward(case.grad_out, *first, y, *rest, **case.options, need=need)


def check_backward(case: Case, need: ScanNeeds = EVERY_GRADIENT, factor: float = 1.0) -> None:
    found = backward(case, need)._asdict()
    _, _, truth = scan_truth(case)
    bound = factor * GRADIENT_BOUND[case.grad_out.dtype]
    for name, expected in truth.items():
        wanted = getattr(need, name[1:]) and expected is not None
        got = found[name]
        assert (got is not None) == wanted, name
        if not wanted:
            continue
        pairs = (
            zip(got, expected, strict=True) if isinstance(expected, tuple) else ((got, expected),)
        )
        for k, (g, e) in enumerate(pairs):
            if not e.any():  # dA of a single token: sums of rounding errors of numbers up to 1e3
                assert g.abs().max() < 1e-3, name
                continue
            assert error(g, e) < bound, f"{name} of direction {k}: {error(g, e):.1e}"


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
    case = scan_case(2, 21, 64, 16, 8, torch.bfloat16, "cuda")
    xz = torch.full((2, 21, 128), float("nan"), device="cuda", dtype=torch.bfloat16)
    slabs = torch.full((2, 2, 21, 8 + 32), float("nan"), device="cuda", dtype=torch.bfloat16)
    first, rest = case.arguments[:5], case.arguments[5:]
    found = cuda.scan_backward(
        case.grad_out, *first, None, *rest, **case.options,
        dz_out=xz[..., 64:], dx_dbl_out=tuple(slabs), need=ScanNeeds(),
    )  # fmt: skip
    expected = backward(case, ScanNeeds())
    assert torch.equal(xz[..., 64:], expected.dz)
    assert xz[..., :64].isnan().all()
    for k in range(2):
        parts = (expected.ddt[k], expected.dB[k], expected.dC[k])
        assert torch.equal(slabs[k], torch.cat(parts, -1))
        assert found.dC[k].data_ptr() == slabs[k][..., 24:].data_ptr()


STRESS: dict[str, Any] = {
    "gradient at one token": lambda c: c.grad_out.mul_(
        (torch.arange(c.grad_out.shape[1], device="cuda") == 98)[:, None]
    ),
    "gradients from 1e-2 to 1e2": lambda c: c.grad_out.mul_(
        10 ** (4 * torch.rand(1, c.grad_out.shape[1], 1, device="cuda") - 2)
    ),
    "gradients of 1e-6": lambda c: c.grad_out.mul_(1e-6),
    "one token 1000 times larger": lambda c: c.arguments[0][0][:, 50].mul_(1000),
}


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
    batch, length, channels = shape
    xz = torch.randn(batch, length, 2 * channels, device="cuda").to(dtype)
    x = xz[..., :channels]
    weight = tuple(torch.randn(channels, 4, device="cuda") for _ in reverse)
    bias = tuple(torch.randn(channels, device="cuda") for _ in reverse)
    grads = tuple(torch.randn(*shape, device="cuda").to(dtype) for _ in reverse)
    out = cuda.conv_silu(x, weight, bias, reverse)
    d_xz = torch.empty_like(xz)
    dx, dweight, dbias = cuda.conv_silu_backward(
        grads, x, weight, bias, reverse,
        dx_out=d_xz[..., :channels], need_x=True, need_weight=True, need_bias=True,
    )  # fmt: skip
    leaves = map_tensors((x, weight, bias), lambda t: t.double().requires_grad_())
    truth = reference.conv_silu(*leaves, reverse)
    flat = [leaves[0], *leaves[1], *leaves[2]]
    expected = torch.autograd.grad(truth, flat, [g.double() for g in grads])
    for k in range(len(reverse)):
        assert error(out[k], truth[k]) < OUTPUT_BOUND[dtype]
    assert dx is not None
    assert dx.data_ptr() == d_xz.data_ptr()
    for found, true in zip((dx, *dweight, *dbias), expected, strict=True):
        assert error(found, true) < GRADIENT_BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["first block", "later block"])
@pytest.mark.parametrize("width", [1, 13, 192, 384, 768, 1100])
def test_the_norms_are_right(width: int, first: bool, rms: bool, dtype: torch.dtype) -> None:
    shape = (3, 50, width)
    hidden = torch.randn(*shape, device="cuda").to(dtype)
    residual = None if first else torch.randn(*shape, device="cuda") * 3 + 1
    weight = torch.randn(width, device="cuda")
    bias = None if rms else torch.randn(width, device="cuda")
    options = {"eps": 1e-5, "rms": rms}
    y, total = cuda.add_norm(
        hidden, residual, weight, bias, residual_dtype=torch.float32, **options
    )
    grads = [torch.randn(*shape, device="cuda").to(t.dtype) for t in (y, total)]
    found = cuda.add_norm_backward(
        *grads, total, weight, need_weight=True, need_bias=not rms, hidden_dtype=dtype,
        residual_in_dtype=None if first else torch.float32, **options,
    )  # fmt: skip
    given = (hidden, residual, weight, bias)
    leaves = map_tensors(given, lambda t: t.double().requires_grad_())
    truth = reference.add_norm(*leaves, residual_dtype=torch.float64, **options)
    flat = [leaf for leaf in leaves if leaf is not None]
    expected = iter(torch.autograd.grad(truth, flat, [g.double() for g in grads]))
    assert error(y, truth[0]) < OUTPUT_BOUND[dtype]
    assert error(total, truth[1]) < OUTPUT_BOUND[torch.float32]
    for gradient, leaf in zip(found, leaves, strict=True):
        assert (gradient is None) == (leaf is None)
        if gradient is not None:
            # width 1: LayerNorm's gradient is exactly zero there and relative errors mean nothing
            true = next(expected)
            assert error(gradient, true) < GRADIENT_BOUND[dtype] or true.norm() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 48, 192, 384, 768, 1280])
@pytest.mark.parametrize("skip", [(), (5,), (0, 10)])
def test_the_prompts_are_right(skip: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    shape = (4, 11, width)
    joint = torch.randn(4, 11, 2 * width, device="cuda").to(dtype)
    x = torch.randn(*shape, device="cuda").to(dtype)
    cross, inner = joint[..., :width], joint[..., width:] * 4
    alpha, beta = torch.randn(2, width, device="cuda")
    grad = torch.randn(*shape, device="cuda").to(dtype)
    for given in (
        (cross, inner, alpha, beta),
        (cross, None, alpha, None),
        (None, inner, None, beta),
    ):
        out = cuda.prompt(x, *given, skip)
        found = cuda.prompt_backward(grad, *given, skip)
        leaves = [None if t is None else t.double().requires_grad_() for t in given]
        truth = reference.prompt(x.double(), *leaves, skip)
        flat = [leaf for leaf in leaves if leaf is not None]
        expected = iter(torch.autograd.grad(truth, flat, grad.double()))
        assert error(out, truth) < OUTPUT_BOUND[dtype]
        assert torch.equal(out[:, list(skip)], x[:, list(skip)])
        for gradient, leaf in zip(found, leaves, strict=True):
            assert (gradient is None) == (leaf is None)
            if gradient is not None:
                assert error(gradient, next(expected)) < GRADIENT_BOUND[dtype]
    zero = torch.zeros(width, device="cuda")
    assert torch.equal(cuda.prompt(x, cross, inner, zero, zero, skip), x)


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
