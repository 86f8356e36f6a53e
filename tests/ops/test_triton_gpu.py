"""The Triton kernels on a GPU against the reference in float64, at full size.

Bounds, as relative L2 error: float32 1e-5 (2 ulp of the special function unit's exp, added up over
the sequence), bfloat16 5e-3 (one rounding is 1.7e-3; y of each direction is rounded before they are
added), float16 an eighth of bfloat16's.
"""

from collections.abc import Iterator

import pytest
import torch

from svp_peft import ops
from svp_peft.ops import triton
from svp_peft.ops.triton import unavailable
from svp_peft.ops.types import ScanGrads, ScanNeeds
from tests.ops import triton_checks as checks
from tests.ops.cuda_cases import EVERY_GRADIENT, error, map_tensors, scan_case, scan_truth

pytestmark = pytest.mark.gpu

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 7e-4}
DTYPES = list(BOUNDS)
LENGTHS = [1, 2, 3, 63, 64, 65, 196, 197, 785, 3137]
FROZEN = ScanNeeds()
BOTH = (False, True)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    # in deterministic mode torch fills new memory with NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["sequential", "parallel"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    from svp_peft.ops.triton import scan_forward

    few = 1 << 30 if request.param == "parallel" else 0
    monkeypatch.setattr(scan_forward, "_FEW_PROGRAMS", few)
    return str(request.param)


def test_it_is_available() -> None:
    assert unavailable(torch.device("cuda")) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_scan_is_right_at_every_length(length: int, dtype: torch.dtype, form: str) -> None:
    checks.check_scan(scan_case(2, length, 96, 16, 12, dtype, "cuda", seed=length), BOUNDS)


@pytest.mark.parametrize("need", [EVERY_GRADIENT, FROZEN], ids=["all", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_scan_gradients_are_right_at_every_length(
    length: int, dtype: torch.dtype, need: ScanNeeds
) -> None:
    case = scan_case(2, length, 96, 16, 12, dtype, "cuda", seed=length)
    checks.check_scan_gradients(case, BOUNDS, need)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 4, 8, 128])
def test_every_batch_size_is_right(batch: int, dtype: torch.dtype) -> None:
    case = scan_case(batch, 19, 64, 16, 4, dtype, "cuda")
    checks.check_scan(case, BOUNDS)
    checks.check_scan_gradients(case, BOUNDS)
    checks.check_scan_gradients(case, BOUNDS, FROZEN)


SIZES = [
    (1, 2, 16, 2),
    (3, 5, 8, 3),
    (2, 33, 32, 4),
    (1, 130, 64, 7),
    (2, 96, 5, 24),
    (2, 160, 8, 48),
    (1, 384, 16, 12),
    (2, 64, 32, 70),
    (8, 256, 16, 16),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size_is_right(
    size: tuple[int, int, int, int], dtype: torch.dtype, form: str
) -> None:
    batch, channels, d_state, rank = size
    case = scan_case(batch, 37, channels, d_state, rank, dtype, "cuda")
    checks.check_scan(case, BOUNDS)
    if form == "sequential":
        checks.check_scan_gradients(case, BOUNDS)
        checks.check_scan_gradients(case, BOUNDS, FROZEN)


OPTIONS = [
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
def test_every_option_is_right(options: dict, dtype: torch.dtype, form: str) -> None:
    case = scan_case(2, 50, 64, 16, 4, dtype, "cuda", **options)
    checks.check_scan(case, BOUNDS)
    if form == "sequential":
        checks.check_scan_gradients(case, BOUNDS)


@pytest.mark.parametrize("name", ScanNeeds._fields)
def test_each_gradient_can_be_had_alone(name: str) -> None:
    need = ScanNeeds(*(field == name for field in ScanNeeds._fields))
    checks.check_scan_gradients(scan_case(2, 30, 64, 16, 4, device="cuda"), BOUNDS, need)


@pytest.mark.parametrize("need", [EVERY_GRADIENT, FROZEN], ids=["all", "frozen"])
def test_two_runs_give_the_same_bits(need: ScanNeeds) -> None:
    case = scan_case(8, 197, 128, 16, 8, torch.bfloat16, "cuda")
    for first, second in zip(
        checks.scan_gradients(case, need), checks.scan_gradients(case, need), strict=True
    ):
        flat = [x if isinstance(x, tuple) else (x,) for x in (first, second)]
        assert all(a is b or torch.equal(a, b) for a, b in zip(*flat, strict=True))


def test_scan_at_full_size_in_slices_of_the_batch() -> None:
    case = scan_case(96, 197, 768, 16, 24, torch.bfloat16, "cuda")
    out, _ = triton.scan(*case.arguments, **case.options, save_y=False)
    found = checks.scan_gradients(case, FROZEN)
    for begin in (0, 93):  # the reference needs a float64 state per token: three images at a time
        piece = slice(begin, begin + 3)
        part = case._replace(
            arguments=(
                *map_tensors(case.arguments[:5], lambda t, p=piece: t[p]),
                *case.arguments[5:],
            ),
            grad_out=case.grad_out[piece],
        )
        true_out, _, truth = scan_truth(part)
        assert error(out[piece], true_out) < BOUNDS[torch.bfloat16]
        for name in ("du", "ddt", "dB", "dC"):
            for value, true_value in zip(getattr(found, name), truth[name], strict=True):
                assert error(value[piece], true_value) < BOUNDS[torch.bfloat16], name
        assert error(found.dz[piece], truth["dz"]) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS[:8])
def test_conv_is_right_with_every_gradient(length: int, dtype: torch.dtype) -> None:
    checks.check_conv(3, length, 130, BOTH, dtype, "cuda", BOUNDS)
    checks.check_conv(3, length, 130, (True,), dtype, "cuda", BOUNDS)


@pytest.mark.parametrize("d_model", [24, 192, 384, 768, 1000])
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_right_with_every_gradient(dtype: torch.dtype, rms: bool, d_model: int) -> None:
    for has_residual in (True, False):
        checks.check_add_norm(
            197, d_model, dtype, "cuda", BOUNDS, rms=rms, has_residual=has_residual
        )


@pytest.mark.parametrize("skip", [(), (98,), (0, 196), tuple(range(0, 196, 14))], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prompt_is_right_with_every_gradient(dtype: torch.dtype, skip: tuple[int, ...]) -> None:
    checks.check_prompt(5, 197, 384, skip, dtype, "cuda", BOUNDS)


def test_kernels_run_in_a_cuda_graph() -> None:
    case = scan_case(4, 65, 96, 16, 12, torch.bfloat16, "cuda")

    def step() -> tuple[torch.Tensor, ScanGrads]:
        out, y = triton.scan(*case.arguments, **case.options, save_y=True)
        return out, checks.scan_gradients(case, EVERY_GRADIENT, y)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out, found = step()
    for u in case.arguments[0]:
        u.mul_(0.5)  # the graph reads the tensors it was captured with
    graph.replay()
    expected_out, expected = step()
    assert torch.equal(out, expected_out)
    assert all(map(torch.equal, found.dA, expected.dA))
    assert all(map(torch.equal, found.du, expected.du))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_tensors_gpu_and_not_on_the_current_one() -> None:
    case = scan_case(2, 33, 64, 16, 4, torch.float32, "cuda:1")
    assert torch.cuda.current_device() == 0
    checks.check_scan(case, BOUNDS)
    checks.check_scan_gradients(case, BOUNDS)
    checks.check_conv(2, 33, 64, BOTH, torch.float32, "cuda:1", BOUNDS)
    checks.check_add_norm(33, 64, torch.float32, "cuda:1", BOUNDS, rms=True, has_residual=True)
    checks.check_prompt(2, 33, 64, (16,), torch.float32, "cuda:1", BOUNDS)


def test_naming_the_backend_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    original = triton.scan
    monkeypatch.setattr(
        triton, "scan", lambda *a, **k: called.append(1) or original(*a, **k), raising=False
    )
    u = torch.randn(2, 8, 5, device="cuda")
    A, B = -torch.rand(8, 16, device="cuda"), torch.randn(2, 16, 5, device="cuda")
    out = ops.selective_scan(u, u, A, B, B, backend="triton")
    expected = ops.selective_scan(*(t.double() for t in (u, u, A, B, B)), backend="reference")
    assert called
    assert error(out, expected) < BOUNDS[torch.float32]
