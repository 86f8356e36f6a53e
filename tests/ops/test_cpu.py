"""The C++ convolution, norm and prompt against float64, and what holds for all C++ kernels.

Tolerances: see cpu_cases.py.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from svp_peft import SVPConfig, VisionMamba, apply_svp
from svp_peft.errors import BackendError
from svp_peft.ops import backends, cpu, reference
from svp_peft.vim.mixer import VimMixer
from tests.ops.cpu_cases import ALL, arguments, backward, options, relative, scan_inputs, single

mixer_op = importlib.import_module("svp_peft.ops.mixer_op")

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    cpu.unavailable(CPU) is not None, reason=f"no C++ kernels: {cpu.unavailable(CPU)}"
)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("batch", "length", "d_inner", "width"),
    [(2, 1, 5, 4), (1, 3, 64, 4), (2, 37, 70, 4), (3, 5, 40, 3), (1, 2, 33, 6), (1, 197, 80, 1)],
)
@pytest.mark.parametrize("directions", [1, 2])
def test_convolution_and_its_gradients_match_float64(
    batch: int, length: int, d_inner: int, width: int, directions: int
) -> None:
    reverse = (False, True)[:directions]
    xz = torch.randn(batch, length, 2 * d_inner)
    x = xz[..., :d_inner]
    weight = [torch.randn(d_inner, width) for _ in reverse]
    bias = [torch.randn(d_inner) for _ in reverse]
    grads = [torch.randn(batch, length, d_inner) for _ in reverse]
    leaf, *parameters = (t.double().requires_grad_() for t in (x, *weight, *bias))
    expected = reference.conv_silu(leaf, parameters[:directions], parameters[directions:], reverse)
    gradients = torch.autograd.grad(expected, [leaf, *parameters], [g.double() for g in grads])
    d_xz = torch.empty_like(xz)
    found = cpu.conv_silu(x, weight, bias, reverse)
    dx, d_weight, d_bias = cpu.conv_silu_backward(
        grads, x, weight, bias, reverse, dx_out=d_xz[..., :d_inner],
        need_x=True, need_weight=True, need_bias=True,
    )  # fmt: skip
    for value, true in zip(found, expected, strict=True):
        assert relative(value, true) < 2e-6
    for value, true in zip((dx, *d_weight, *d_bias), gradients, strict=True):
        assert relative(value, true) < 2e-6
    assert dx.data_ptr() == d_xz.data_ptr()
    assert d_xz[..., d_inner:].isnan().all()


def test_convolution_without_bias_makes_only_what_is_asked_for() -> None:
    x, weight = torch.randn(2, 9, 20), [torch.randn(20, 4)]
    expected = reference.conv_silu(x.double(), [weight[0].double()], None, (True,))[0]
    assert relative(cpu.conv_silu(x, weight, None, (True,))[0], expected) < 2e-6
    nothing = cpu.conv_silu_backward(
        [x], x, weight, None, (True,), need_x=False, need_weight=False, need_bias=True
    )
    assert nothing == (None, None, None)


@pytest.mark.parametrize("value", [float("nan"), 90.0, -90.0, 1e30, -1e30])
def test_silu_of_an_extreme_value_is_pytorchs(value: float) -> None:
    x = torch.full((1, 1, 20), value)
    got = cpu.conv_silu(x, [torch.ones(20, 1)], None, (False,))[0]
    torch.testing.assert_close(got, torch.nn.functional.silu(x), equal_nan=True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("shape", [(2, 1, 5), (3, 50, 33), (2, 197, 384), (7, 48), (64,)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_norm_and_its_gradients_match_float64(
    shape: tuple[int, ...], rms: bool, with_residual: bool
) -> None:
    hidden, residual, grad_y, grad_total = (torch.randn(shape) for _ in range(4))
    weight, bias = torch.randn(shape[-1]), torch.randn(shape[-1])
    settings = {"eps": 1e-5, "rms": rms}
    leaves = [t.double().requires_grad_() for t in (hidden, residual, weight, bias)]
    given = [leaves[0], leaves[1] if with_residual else None, *leaves[2:]]
    expected = reference.add_norm(*given, residual_dtype=torch.float64, **settings)
    gradients = torch.autograd.grad(
        expected, [t for t in given if t is not None], (grad_y.double(), grad_total.double())
    )
    y, total = cpu.add_norm(
        hidden, residual if with_residual else None, weight, bias,
        residual_dtype=torch.float32, **settings,
    )  # fmt: skip
    found = cpu.add_norm_backward(
        grad_y, grad_total, total, weight, need_weight=True, need_bias=True,
        hidden_dtype=torch.float32, residual_in_dtype=torch.float32 if with_residual else None,
        **settings,
    )  # fmt: skip
    assert relative(y, expected[0]) < 2e-6
    assert relative(total, expected[1]) < 2e-6
    for value, true in zip([f for f in found if f is not None], gradients, strict=True):
        assert relative(value, true) < 2e-6


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(2, 1, 5), (3, 50, 33), (2, 197, 48)])
def test_prompt_and_its_gradients_match_float64(shape: tuple[int, int, int]) -> None:
    x, cross, inner, grad = (torch.randn(shape) for _ in range(4))
    alpha, beta = torch.randn(shape[-1]), torch.randn(shape[-1])
    skip = (0, shape[1] // 2) if shape[1] > 1 else ()
    leaves = [t.double().requires_grad_() for t in (cross, inner, alpha, beta)]
    expected = reference.prompt(x.double(), *leaves, skip)
    gradients = torch.autograd.grad(expected, leaves, grad.double())
    found = cpu.prompt(x, cross, inner, alpha, beta, skip)
    assert relative(found, expected) < 2e-6
    for t in skip:
        assert torch.equal(found[:, t], x[:, t])
    for value, true in zip(
        cpu.prompt_backward(grad, cross, inner, alpha, beta, skip), gradients, strict=True
    ):
        assert relative(value, true) < 2e-6


@pytest.mark.usefixtures("poisoned")
def test_an_empty_batch_gives_every_parameter_a_gradient_of_zeros() -> None:
    empty, width = torch.zeros(0, 5, 24), torch.randn(24)
    taps = (torch.randn(24, 4), torch.randn(24, 4))
    _, d_weight, d_bias = cpu.conv_silu_backward(
        (empty, empty), empty, taps, (width, width), (False, True),
        need_x=True, need_weight=True, need_bias=True,
    )  # fmt: skip
    _, _, d_gain, d_shift = cpu.add_norm_backward(
        empty, None, empty, width, eps=1e-5, rms=False, need_weight=True, need_bias=True,
        hidden_dtype=torch.float32, residual_in_dtype=None,
    )  # fmt: skip
    _, _, d_alpha, d_beta = cpu.prompt_backward(empty, empty, empty, width, width, ())
    for gradient in (*d_weight, *d_bias, d_gain, d_shift, d_alpha, d_beta):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_prompt_with_zero_scales_is_the_identity_bit_for_bit() -> None:
    x, other = torch.randn(2, 9, 48), torch.randn(2, 9, 48)
    x[0, 0, :3] = torch.tensor([1e-40, -1e-40, 3e38])
    zero = torch.zeros(48)
    assert torch.equal(cpu.prompt(x, other, other, zero, zero, (4,)), x)


def test_auto_takes_the_kernels_for_float32_and_the_reference_for_float64() -> None:
    assert backends.choose("auto", CPU, torch.float32) == "cpu"
    assert backends.choose("auto", CPU, torch.float64) == "reference"
    with pytest.raises(BackendError, match="it computes in float32"):
        backends.choose("cpu", CPU, torch.float64)
    assert "run on a CPU" in cpu.unavailable(torch.device("cuda"))


@pytest.mark.parametrize("size", [(8, 50, 96, 16, 6), (1, 33, 600, 16, 6)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(size: tuple[int, ...]) -> None:
    inputs = single(scan_inputs(*size))
    grad = torch.randn(size[0], size[1], size[2])
    taps = [torch.randn(size[2], 4) for _ in range(2)]
    alpha = torch.randn(size[2])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out, y = cpu.scan(*arguments(inputs), save_y=True, **options(inputs))
            # dt_weight is left out: its sum is a matrix product by PyTorch
            grads = backward(inputs, grad, y, need=ALL._replace(dt=False, dt_weight=False))
            flat = [
                t for g in grads if g is not None for t in ([g] if isinstance(g, Tensor) else g)
            ]
            conv = cpu.conv_silu_backward(
                inputs["u"], grad, taps, [alpha, alpha], (False, True),
                need_x=True, need_weight=True, need_bias=True,
            )  # fmt: skip
            norm = cpu.add_norm_backward(
                grad, None, inputs["u"][0], alpha, eps=1e-5, rms=False, need_weight=True,
                need_bias=True, hidden_dtype=torch.float32, residual_in_dtype=None,
            )  # fmt: skip
            prompt = cpu.prompt_backward(grad, *inputs["u"], alpha, alpha, (3,))
            results.append([out, *flat, conv[0], *conv[1], *conv[2], norm[0], *norm[2:], *prompt])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_other_instruction_sets_give_the_same_numbers(capability: str) -> None:
    """Tests of the scan and of SiLU again, with the code that an older processor gets."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("the instruction set is already chosen by ATEN_CPU_CAPABILITY")
    folder = Path(__file__).parent
    tests = [
        f"{folder}/test_cpu_scan.py",
        f"{__file__}::{test_silu_of_an_extreme_value_is_pytorchs.__name__}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout


def test_a_large_batch_goes_through_the_mixer_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = VimMixer(16, bimamba_type="v2")
    tokens = torch.randn(5, 9, 16, requires_grad=True)
    inputs = (tokens, *mixer.parameters())

    def run() -> tuple[Tensor, ...]:
        out = mixer(tokens)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    whole = run()
    sizes: list[int] = []
    forward = mixer_op.forward_pass
    monkeypatch.setattr(
        mixer_op, "forward_pass", lambda h, *rest: sizes.append(len(h)) or forward(h, *rest)
    )
    monkeypatch.setattr(mixer_op, "_AT_ONCE_ON_CPU", 2 * 9 * 64)  # two images
    for part, truth in zip(run(), whole, strict=True):
        assert relative(part, truth) < 2e-6
    assert sizes == [2, 2, 1]


def test_a_named_backend_serves_a_patched_model_under_autocast():
    model = VisionMamba(
        img_size=32, patch_size=8, stride=8, embed_dim=32, depth=2, num_classes=5,
        rms_norm=True, fused_add_norm=True, residual_in_fp32=True,
    )  # fmt: skip
    apply_svp(model, SVPConfig(inner_bottleneck=4))
    torch.nn.init.normal_(model.svp.alpha)
    torch.nn.init.normal_(model.svp.beta)
    images = torch.randn(2, 3, 32, 32)
    results = []
    try:
        for name in ("cpu", "auto"):
            backends.set_backend(name)
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images)
            logits.float().sum().backward()
            results.append((logits, model.svp.alpha.grad.clone()))
    finally:
        backends.set_backend("auto")
    (named, named_grad), (automatic, automatic_grad) = results
    assert torch.equal(named, automatic)
    assert torch.equal(named_grad, automatic_grad)
