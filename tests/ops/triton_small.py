"""Small sizes under Triton's interpreter, on a CPU. Run by test_triton.py in a process of its own.

Triton decides when it is imported whether its kernels are compiled or interpreted, and other tests
need it compiled. Bounds, as relative L2 error: 2e-6 for float32, a few roundings of 6e-8; the
interpreter rounds to bfloat16 towards zero, which is 8e-3 an element, and float16 an eighth of it.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from svp_peft.ops import triton
from svp_peft.ops.triton import norm, scan_forward, scan_gradients
from svp_peft.ops.types import ScanNeeds
from tests.ops import triton_checks as checks
from tests.ops.cuda_cases import scan_case

assert os.environ.get("TRITON_INTERPRET") == "1", "run by tests/ops/test_triton.py"

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
FULL = [torch.float32, torch.bfloat16, torch.float16]
FROZEN = ScanNeeds()
BOTH = (False, True)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    # in deterministic mode torch fills new memory with NaN
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _sequential(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_forward, "_FEW_PROGRAMS", 0)


@pytest.fixture
def parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_forward, "_FEW_PROGRAMS", 1 << 30)
    # the interpreter goes through a tile element by element
    monkeypatch.setattr(scan_forward, "_TILE", 4)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 33])
def test_scan_is_right_at_every_length(length: int) -> None:
    checks.check_scan(scan_case(1, length, 5, 16, 3, seed=length), BOUNDS)


@pytest.mark.usefixtures("parallel")
@pytest.mark.parametrize("length", [1, 4, 9])
def test_parallel_scan_is_right_at_every_length(length: int) -> None:
    checks.check_scan(scan_case(1, length, 3, 16, 3, seed=length), BOUNDS)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 33])
def test_scan_has_every_gradient_at_every_length(length: int) -> None:
    checks.check_scan_gradients(scan_case(1, length, 5, 16, 3, seed=length), BOUNDS)


def test_scan_takes_several_images_and_blocks_of_channels() -> None:
    case = scan_case(2, 5, 33, 16, 3)
    checks.check_scan(case, BOUNDS)
    checks.check_scan_gradients(case, BOUNDS)
    checks.check_scan_gradients(case, {torch.float32: 5e-6}, FROZEN)


@pytest.mark.parametrize("length", [1, 2, 5, 33])
def test_scan_has_the_activations_gradients_alone(length: int) -> None:
    # another path: without dA the sweeps exchange one number per channel instead of states
    case = scan_case(1, length, 5, 16, 3, seed=length)
    checks.check_scan_gradients(case, {torch.float32: 5e-6}, FROZEN)


@pytest.mark.parametrize("name", ScanNeeds._fields)
def test_scan_makes_each_gradient_alone(name: str) -> None:
    need = ScanNeeds(*(field == name for field in ScanNeeds._fields))
    checks.check_scan_gradients(scan_case(1, 6, 5, 8, 3), {torch.float32: 5e-6}, need)


@pytest.mark.parametrize("d_state", [1, 5, 8, 32, 64])
def test_scan_takes_any_number_of_states(d_state: int) -> None:
    case = scan_case(1, 6, 6, d_state, 2)
    checks.check_scan(case, BOUNDS)
    checks.check_scan_gradients(case, BOUNDS)
    checks.check_scan_gradients(case, {torch.float32: 5e-6}, FROZEN)


@pytest.mark.usefixtures("parallel")
@pytest.mark.parametrize("d_state", [5, 64])
def test_parallel_scan_takes_any_number_of_states(d_state: int) -> None:
    checks.check_scan(scan_case(1, 5, 1, d_state, 2), BOUNDS)


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


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_scan_takes_every_option(options: dict) -> None:
    case = scan_case(1, 6, 5, 8, 3, **options)
    checks.check_scan(case, BOUNDS)
    checks.check_scan_gradients(case, BOUNDS)


@pytest.mark.parametrize("dtype", FULL)
def test_scan_takes_every_dtype(dtype: torch.dtype) -> None:
    case = scan_case(2, 9, 16, 8, 3, dtype)
    checks.check_scan(case, BOUNDS)
    checks.check_scan_gradients(case, BOUNDS)


def test_scan_goes_through_the_batch_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    case = scan_case(3, 5, 5, 8, 3)
    whole = checks.scan_gradients(case, checks.EVERY_GRADIENT)
    monkeypatch.setattr(scan_gradients, "_SCRATCH_BYTES", 1)
    pieces = checks.scan_gradients(case, checks.EVERY_GRADIENT)
    for name in ("du", "ddt", "dB", "dC"):
        assert all(map(torch.equal, getattr(whole, name), getattr(pieces, name))), name
    for name in ("dA", "dD", "ddt_weight", "ddt_bias"):
        for a, b in zip(getattr(whole, name), getattr(pieces, name), strict=True):
            torch.testing.assert_close(a, b)
    checks.check_scan_gradients(case, BOUNDS)


def test_scan_writes_gradients_into_the_views_given() -> None:
    case = scan_case(2, 6, 8, 8, 3)
    xz = torch.full((2, 6, 16), torch.nan)
    slabs = torch.full((2, 2, 6, 3 + 16), torch.nan)
    found = checks.scan_gradients(case, FROZEN, dz_out=xz[..., 8:], dx_dbl_out=tuple(slabs))
    expected = checks.scan_gradients(case, FROZEN)
    assert torch.equal(xz[..., 8:], expected.dz)
    assert xz[..., :8].isnan().all()
    assert found.dz.data_ptr() == xz[..., 8:].data_ptr()
    for k, slab in enumerate(slabs):
        parts = (expected.ddt[k], expected.dB[k], expected.dC[k])
        assert torch.equal(slab, torch.cat(parts, dim=-1))


def test_scan_uses_the_y_it_is_given() -> None:
    case = scan_case(2, 6, 8, 8, 3)
    _, y = triton.scan(*case.arguments, **case.options, save_y=True)
    only_z = ScanNeeds(*(name == "z" for name in ScanNeeds._fields))
    assert torch.equal(
        checks.scan_gradients(case, only_z, y).dz, checks.scan_gradients(case, only_z).dz
    )
    assert not checks.scan_gradients(case, only_z, torch.zeros_like(y)).dz.any()


@pytest.mark.parametrize("batch", [0, 1])
def test_scan_of_nothing_is_nothing(batch: int) -> None:
    case = scan_case(batch, 1 - batch, 8, 8, 3)
    out, y = triton.scan(*case.arguments, **case.options, save_y=True)
    assert out.shape == y.shape == (batch, 1 - batch, 8)
    found = checks.scan_gradients(case, checks.EVERY_GRADIENT)
    assert not any(g.any() for g in (*found.dA, *found.dD, *found.ddt_bias))


@pytest.mark.parametrize("reverse", [BOTH, (True, False), (False,), (True,)], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 7, 35])
def test_conv_is_right_with_every_gradient(length: int, reverse: tuple[bool, ...]) -> None:
    checks.check_conv(1, length, 8, reverse, torch.float32, "cpu", BOUNDS)


def test_conv_takes_several_images_and_blocks_of_channels() -> None:
    checks.check_conv(2, 3, 70, BOTH, torch.float32, "cpu", BOUNDS)


@pytest.mark.parametrize("dtype", FULL)
@pytest.mark.parametrize(("width", "has_bias"), [(4, False), (2, True), (3, True)])
def test_conv_takes_every_dtype_and_width(dtype: torch.dtype, width: int, has_bias: bool) -> None:
    checks.check_conv(1, 5, 8, BOTH, dtype, "cpu", BOUNDS, width, has_bias)


@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("dtype", FULL)
def test_norm_is_right_with_every_gradient(
    dtype: torch.dtype, rms: bool, has_residual: bool
) -> None:
    checks.check_add_norm(5, 24, dtype, "cpu", BOUNDS, rms=rms, has_residual=has_residual)


def test_norm_shares_many_tokens_among_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "_PARTS", 3)
    checks.check_add_norm(4, 8, torch.float32, "cpu", BOUNDS, rms=True, has_residual=True)


@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float16])
def test_norm_keeps_the_residual_in_the_dtype_asked_for(residual_dtype: torch.dtype) -> None:
    checks.check_add_norm(
        2, 24, residual_dtype, "cpu", BOUNDS,
        rms=True, has_residual=True, residual_dtype=residual_dtype,
    )  # fmt: skip


@pytest.mark.parametrize("skip", [(), (3,), (0, 6), (0, 1, 2, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("dtype", FULL)
def test_prompt_is_right_with_every_gradient(dtype: torch.dtype, skip: tuple[int, ...]) -> None:
    checks.check_prompt(2, 7, 40, skip, dtype, "cpu", BOUNDS)


@pytest.mark.parametrize(("has_cross", "has_inner"), [(True, False), (False, True)])
def test_prompt_takes_either_alone(has_cross: bool, has_inner: bool) -> None:
    checks.check_prompt(
        1, 9, 8, (4,), torch.float32, "cpu", BOUNDS, has_cross=has_cross, has_inner=has_inner
    )


def test_prompt_sums_over_many_tokens() -> None:
    checks.check_prompt(2, 70, 136, (45,), torch.float32, "cpu", BOUNDS)
