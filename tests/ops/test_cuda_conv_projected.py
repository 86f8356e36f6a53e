"""The convolution's input gradient with the product before it, emulated on a CPU and on a GPU."""

import pytest
import torch

from svp_peft.ops import reference
from svp_peft.ops.cuda import conv_projected
from tests.ops.cuda_cases import error, map_tensors
from tests.ops.cuda_on_cpu.emulator import ORDERS
from tests.ops.cuda_on_cpu.gpu import EmulatedGpu

# the result's rounding alone: one more, of the sum that the product starts from, would exceed it
BOUND = {torch.bfloat16: 2e-3, torch.float16: 2.5e-4}
BOTH, FORWARD, BACKWARD = (False, True), (False,), (True,)
LENGTHS = [1, 2, 3, 5, 64, 65, 197]
CASES = [
    # batch, length, channels, row, width, reverse, bias
    *((1 + i % 5, n, 64, 56, 4, BOTH, True) for i, n in enumerate(LENGTHS)),
    (2, 37, 32, 24, 2, FORWARD, True),
    (2, 37, 96, 96, 3, (True, False), False),
    (3, 65, 128, 40, 4, BACKWARD, False),
    (1, 19, 160, 64, 4, BOTH, True),
    (1, 33, 256, 80, 4, FORWARD, True),
]


def check(case: tuple, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Run the kernel once and compare with float64; returns what it wrote."""
    batch, length, channels, row, width, reverse, has_bias = case
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    count = len(reverse)
    xz = draw(batch, length, 2 * channels)
    weight = tuple(draw(channels, width, dtype=torch.float32) for _ in reverse)
    bias = tuple(draw(channels, dtype=torch.float32) for _ in reverse) if has_bias else None
    d_u = draw(count, batch, length, channels)
    d_x_dbl, x_proj = draw(count, batch, length, row), draw(count, row, channels)
    d_xz = torch.full_like(xz, float("nan"))
    assert conv_projected.supports(width, row, channels)
    kernel, grid, chunk = conv_projected.projected_launch(
        0, dtype, batch, length, row, weight, bias, reverse
    )

    def pair(tensors) -> tuple[int, int]:
        return tensors[0].data_ptr(), tensors[1].data_ptr() if count == 2 else 0

    kernel(
        grid, xz.data_ptr(), *pair(weight), *(pair(bias) if bias else (0, 0)), d_u.data_ptr(),
        d_x_dbl.data_ptr(), x_proj.data_ptr(), d_xz.data_ptr(), length, chunk,
    )  # fmt: skip
    d_x, rest = d_xz[..., :channels], d_xz[..., channels:]
    assert rest.isnan().all(), "the second half belongs to the scan"

    x = xz[..., :channels].double().requires_grad_()
    out = reference.conv_silu(x, *map_tensors((weight, bias), lambda t: t.double()), reverse)
    whole = d_u.double() + (d_x_dbl.flatten(1, 2).double() @ x_proj.double()).view(d_u.shape)
    (truth,) = torch.autograd.grad(out, x, tuple(whole))
    assert error(d_x, truth) < BOUND[dtype]
    return d_x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("gpu")
def test_the_gradient_has_no_rounding_but_its_own(case: tuple, dtype: torch.dtype) -> None:
    check(case, dtype, "cpu")


@pytest.mark.parametrize("multiprocessors", [1, 2, 132])
def test_blocks_of_any_length_join_without_a_seam(multiprocessors: int, gpu: EmulatedGpu) -> None:
    gpu.multiprocessors = multiprocessors
    check((3, 197, 64, 56, 4, BOTH, True), torch.bfloat16, "cpu")


def test_the_order_of_threads_does_not_matter(gpu: EmulatedGpu) -> None:
    found = []
    for order in ORDERS:
        gpu.order = order
        found.append(check((2, 50, 128, 56, 4, BOTH, True), torch.bfloat16, "cpu"))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES, (8, 197, 768, 56, 4, BOTH, True)], ids=str)
def test_the_gradient_on_a_gpu(case: tuple, dtype: torch.dtype) -> None:
    assert torch.equal(check(case, dtype, "cuda"), check(case, dtype, "cuda"))


@pytest.mark.parametrize(("length", "units"), [(1, 1), (197, 48), (197, 576), (5000, 3)])
def test_blocks_are_whole_tiles_and_cover_the_image(length: int, units: int) -> None:
    for seam in (0, 2, 6):
        chunk = conv_projected._chunk(length, seam, units, 396)
        assert chunk > 0
        assert (chunk + seam) % 16 == 0
        assert chunk - length < 16, "a tile for nothing"
