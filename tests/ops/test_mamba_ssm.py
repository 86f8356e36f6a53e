"""Backend `mamba_ssm` on packages that look like mamba-ssm's releases, each in its own process.

What computes on a GPU is tested by test_mamba_ssm_gpu.py. Bound on values and gradients against the
reference in float64: 2e-6, float32 rounding of a few dozen additions.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from svp_peft.ops import mamba_ssm, reference
from svp_peft.ops.types import MixerWeights
from tests.ops.cuda_cases import error, map_tensors, scan_case, scan_truth
from tests.ops.mamba_lookalikes import RELEASES, write_causal_conv1d, write_mamba_ssm
from tests.processes import Processes

BOUND = 2e-6


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    with Processes() as server:
        yield server


# the functions below run in the other processes


def reason_on(root: str, device: str, *, gpu: bool = True, without: str = "") -> str | None:
    """What `unavailable` says with `root` on the path."""
    sys.path.insert(0, root)
    if without:
        sys.modules[without] = None  # type: ignore[assignment]
    torch.cuda.is_available = lambda: gpu  # type: ignore[assignment]
    reason = mamba_ssm.unavailable(torch.device(device))
    assert reason == mamba_ssm.unavailable(torch.device(device))
    return reason


def imported_by_a_refusal(root: str) -> list[str]:
    sys.path.insert(0, root)
    mamba_ssm.unavailable(torch.device("cpu"))
    return sorted({"mamba_ssm", "causal_conv1d"} & set(sys.modules))


def worst_scan_error(root: str) -> float:
    """Of values and gradients, over directions and options."""
    sys.path.insert(0, root)
    worst = 0.0
    for options in (
        {},
        {"directions": 1},
        {"directions": 1, "backwards": True},
        {"gate": False, "skip": False, "bias": False},
        {"low_rank": False, "softplus": False, "a_is_log": False},
        {"parameter_dtype": torch.bfloat16},
        {"parameter_dtype": torch.float64},
    ):
        case = scan_case(2, 7, 6, 4, 3, **options)
        out, y, gradients = scan_truth(case)
        leaves = map_tensors(case.arguments, lambda t: t.detach().requires_grad_())
        found, found_y = mamba_ssm.scan(*leaves, **case.options)
        worst = max(worst, error(found, out), error(found_y, y))
        found.backward(case.grad_out)
        bound = 1.0 if options.get("parameter_dtype") != torch.bfloat16 else BOUND / 4e-3
        for leaf, gradient in zip(leaves, gradients.values(), strict=True):
            for a, b in _pairs(leaf, gradient):
                # the gradient of a bfloat16 parameter is rounded to it
                factor = bound if a.dtype == torch.bfloat16 else 1.0
                worst = max(worst, factor * error(a.grad, b))
    return worst


def worst_conv_error(root: str) -> float:
    sys.path.insert(0, root)
    worst = 0.0
    for reverse, width, has_bias in (((False, True), 4, True), ((True,), 3, False)):
        leaves = [torch.randn(2, 7, 12).requires_grad_()]
        leaves += [torch.randn(6, width).requires_grad_() for _ in reverse]
        leaves += [torch.randn(6).requires_grad_() for _ in reverse if has_bias]
        grads = [torch.randn(2, 7, 6) for _ in reverse]
        results = []
        for function, dtype in ((mamba_ssm.conv_silu, None), (reference.conv_silu, torch.float64)):
            x, *rest = [t if dtype is None else t.to(dtype) for t in leaves]
            count = len(reverse)
            out = function(x[..., :6], rest[:count], rest[count:] or None, reverse)
            found = torch.autograd.grad(out, leaves, [g.to(out[0].dtype) for g in grads])
            results.append((*out, *found))
        worst = max(worst, *(error(a, b) for a, b in zip(*results, strict=True)))
    return worst


def worst_mixer_error(root: str, dtype_name: str) -> float:
    """Of the output and every gradient, for each kind of mixer."""
    sys.path.insert(0, root)
    dtype = getattr(torch, dtype_name)
    worst = 0.0
    for convs, scans in ((1, 1), (1, 2), (2, 2)):
        weights = _mixer_weights(convs, scans)
        hidden = torch.randn(2, 7, 4).to(dtype).requires_grad_()
        leaves = [hidden, *(t for t in _flat(weights) if t is not None)]
        for scale in (1.0, 0.5):
            out = mamba_ssm.mixer(hidden, weights, scale=scale)
            assert out.dtype == dtype
            truth = reference.mixer(
                hidden.double(), MixerWeights(*map_tensors(tuple(weights), Tensor.double)),
                scale=scale,
            )  # fmt: skip
            grad = torch.randn_like(out)
            found = torch.autograd.grad(out, leaves, grad)
            expected = torch.autograd.grad(truth, leaves, grad.double())
            pairs = zip((out, *found), (truth, *expected), strict=True)
            worst = max(worst, *(error(a, b) for a, b in pairs))
    return worst


def shapes_of_nothing(root: str) -> list[list[int]]:
    sys.path.insert(0, root)
    case = scan_case(0, 3, 6, 4, 3)
    out, _ = mamba_ssm.scan(*case.arguments, **case.options)
    x = torch.zeros(0, 3, 6)
    (u,) = mamba_ssm.conv_silu(x, [torch.zeros(6, 4)], None, (False,))
    mixed = mamba_ssm.mixer(torch.zeros(0, 3, 4), _mixer_weights(2, 2), scale=0.5)
    return [list(t.shape) for t in (out, u, mixed)]


def _mixer_weights(convs: int, scans: int) -> MixerWeights:
    def several(count: int, *shape: int) -> tuple[Tensor, ...]:
        return tuple(0.4 * torch.randn(*shape) for _ in range(count))

    weights = MixerWeights(
        *several(1, 16, 4), None, several(convs, 8, 4), several(convs, 8), several(convs, 3 + 8, 8),
        several(convs, 8, 3), several(convs, 8), several(scans, 8, 4), several(convs, 8),
        *several(1, 4, 8), *several(1, 4),
    )  # fmt: skip
    return MixerWeights(*map_tensors(tuple(weights), lambda t: t.requires_grad_()))


def _flat(value: object) -> list[Tensor | None]:
    if isinstance(value, tuple):
        return [t for part in value for t in _flat(part)]
    return [value]  # type: ignore[list-item]


def _pairs(leaf: object, gradient: object) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(_flat(leaf), _flat(gradient), strict=True)
    return [(a, b) for a, b in pairs if a is not None and b is not None]


# the tests


@pytest.fixture
def packages(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A folder with stock packages; the number of arguments of the convolution is the parameter."""
    write_mamba_ssm(tmp_path)
    write_causal_conv1d(tmp_path, getattr(request, "param", 7))
    return str(tmp_path)


@pytest.mark.parametrize("packages", [5, 7, 8], indirect=True)
def test_every_release_is_accepted_and_computes_the_reference(
    processes: Processes, packages: str
) -> None:
    calls = [
        (reason_on, (packages, "cuda"), {}),
        (worst_conv_error, (packages,), {}),
        (worst_scan_error, (packages,), {}),
        (worst_mixer_error, (packages, "float32"), {}),
        (worst_mixer_error, (packages, "bfloat16"), {}),
    ]
    answers = processes.call_all(calls)
    assert all(not answer.error for answer in answers), answers
    reason, conv, scan, mixer, half = (answer.value for answer in answers)
    assert reason is None
    assert conv < BOUND
    assert scan < BOUND
    assert mixer < BOUND
    # bfloat16: a rounding of 1.7e-3 at each of a dozen steps
    assert half < 3e-2


def test_nothing_in_is_nothing_out(processes: Processes, packages: str) -> None:
    answer = processes.call(shapes_of_nothing, packages)
    assert answer.value == [[0, 3, 6], [0, 3, 6], [0, 3, 4]], answer


def test_a_refusal_imports_neither_package(processes: Processes, packages: str) -> None:
    assert processes.call(imported_by_a_refusal, packages).value == []


def refusal(processes: Processes, root: Path | str, device: str = "cuda", **options: object) -> str:
    answer = processes.call(reason_on, str(root), device, **options)
    assert isinstance(answer.value, str), answer
    return answer.value


def test_a_cpu_is_refused(processes: Processes, packages: str) -> None:
    assert "tensors are on cpu" in refusal(processes, packages, "cpu")


def test_a_machine_without_a_gpu_is_refused(processes: Processes, packages: str) -> None:
    assert "torch finds no GPU" in refusal(processes, packages, gpu=False)


@pytest.mark.skipif(mamba_ssm.stock._folder("mamba_ssm") is not None, reason="mamba-ssm is here")
def test_an_absent_mamba_ssm_is_named_with_its_remedy(processes: Processes, tmp_path: Path) -> None:
    reason = refusal(processes, tmp_path)
    assert reason.startswith("mamba-ssm is not installed.")
    assert "pip install --no-build-isolation causal-conv1d mamba-ssm" in reason


@pytest.mark.parametrize(
    "fork",
    [
        {"mixer_arguments": "d_model, bimamba_type='none', if_divide_out=False"},
        {"mixer_arguments": "d_model, bimamba=True"},
        {"mixer_arguments": "d_model, nslices=5"},
        {"interface_extra": "def mamba_inner_fn_no_out_proj(*args): pass"},
    ],
    ids=str,
)
def test_a_fork_is_refused_by_name(processes: Processes, tmp_path: Path, fork: dict) -> None:
    write_mamba_ssm(tmp_path, "1.1.1", **fork)
    write_causal_conv1d(tmp_path, 5)
    reason = refusal(processes, tmp_path)
    assert f"the mamba_ssm in {tmp_path / 'mamba_ssm'} is a fork" in reason
    assert "--force-reinstall" in reason


@pytest.mark.skipif(
    mamba_ssm.stock._folder("causal_conv1d") is not None, reason="causal-conv1d is here"
)
def test_an_absent_causal_conv1d_is_named(processes: Processes, tmp_path: Path) -> None:
    write_mamba_ssm(tmp_path)
    assert refusal(processes, tmp_path).startswith("causal-conv1d is not installed")


def test_releases_before_1_1_are_too_old(processes: Processes, tmp_path: Path) -> None:
    write_mamba_ssm(tmp_path)
    write_causal_conv1d(tmp_path, 4)
    reason = refusal(processes, tmp_path)
    assert reason.startswith(f"causal-conv1d {RELEASES[4]} is older than 1.1.")
    assert "pip install -U --no-build-isolation causal-conv1d" in reason


def test_an_old_mamba_ssm_is_too_old(processes: Processes, tmp_path: Path) -> None:
    write_mamba_ssm(tmp_path, "1.0.1")
    write_causal_conv1d(tmp_path)
    assert refusal(processes, tmp_path).startswith("mamba-ssm 1.0.1 is older than 1.1.")


def test_an_extension_for_another_torch_is_named(processes: Processes, tmp_path: Path) -> None:
    write_mamba_ssm(tmp_path)
    write_causal_conv1d(tmp_path, broken=True)
    reason = refusal(processes, tmp_path)
    assert reason.startswith("causal-conv1d does not load")
    assert "undefined symbol" in reason
    assert "--no-build-isolation causal-conv1d" in reason


def test_a_missing_extension_of_mamba_ssm_is_named(processes: Processes, tmp_path: Path) -> None:
    write_mamba_ssm(tmp_path, imports="import selective_scan_cuda")
    write_causal_conv1d(tmp_path)
    reason = refusal(processes, tmp_path, without="selective_scan_cuda")
    assert reason.startswith("mamba-ssm does not load")
    assert "--no-build-isolation mamba-ssm" in reason


def test_the_unguarded_import_of_triton_is_named(processes: Processes, tmp_path: Path) -> None:
    write_mamba_ssm(tmp_path, imports="import triton")
    write_causal_conv1d(tmp_path)
    reason = refusal(processes, tmp_path, without="triton")
    assert "`pip install triton`" in reason


def test_a_package_without_metadata_is_judged_by_what_it_does(
    processes: Processes, tmp_path: Path
) -> None:
    write_mamba_ssm(tmp_path)
    write_causal_conv1d(tmp_path)
    for folder in tmp_path.glob("*.dist-info"):
        (folder / "METADATA").unlink()
        folder.rmdir()
    assert processes.call(reason_on, str(tmp_path), "cuda").value is None
