"""The CUDA sources compile for every architecture that they claim, on a machine without a GPU.

The launchers run on CPU tensors with a recorder in the place of the kernel class, so what is
compiled here is exactly what they ask for, and the size of every argument struct is checked too.
"""

import importlib
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

from svp_peft.errors import InputError
from svp_peft.ops import cuda, mixer_passes
from svp_peft.ops.cuda import conv_projected, kernels
from svp_peft.ops.cuda.nvrtc import Nvrtc, find_nvrtc
from svp_peft.ops.cuda.prompter_copies import Packed
from svp_peft.ops.cuda.stack_kernels import StackKernels
from svp_peft.ops.types import Cache, FrozenBlock, MixerWeights, PromptWeights, ScanNeeds
from tests.ops.cuda_cases import EVERY_GRADIENT, scan_case

ARCHITECTURES = ("sm_80", "sm_90")
# by import_module: the package's attributes of these names are the functions
_MODULES = [
    importlib.import_module(f"svp_peft.ops.cuda.{name}")
    for name in (
        "conv", "norm", "prompt", "scan", "scan_backward", "joint_prompt", "frozen_mixer",
        "conv_projected", "prompt_rows", "prompter_copies", "stack_kernels", "wide",
    )
]  # fmt: skip


@pytest.fixture
def nvrtc() -> Nvrtc:
    found = find_nvrtc()
    if isinstance(found, str):
        pytest.skip(found)
    return found


class _Recorder:
    """Stands for `Kernel`: notes what it is asked to build and how it is called."""

    asked: ClassVar[list[tuple[Any, ...]]] = []
    launches: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(
        self, source: str, entry: str, macros: Any, layout: str, device: int, **launch: int
    ) -> None:
        self.device = device
        self._format = kernels.struct.Struct(layout)
        self._what = (source, entry, tuple(sorted(macros.items())))
        self.asked.append((source, entry, tuple(sorted(macros.items())), layout, launch))

    def __call__(self, grid: tuple[int, int, int], *values: float) -> None:
        self._format.pack(*values)
        assert all(side > 0 for side in grid)
        # addresses differ from call to call; sizes, distances of rows and factors do not
        sizes = tuple(v for v in values if abs(v) < 1 << 24)
        self.launches.append((self._what, grid, sizes))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    caches = [
        value for m in _MODULES for value in vars(m).values() if hasattr(value, "cache_clear")
    ]
    for module in _MODULES:
        for name, value in (
            ("Kernel", _Recorder),
            ("device_index", lambda _: 0),
            ("multiprocessors", lambda _: 132),
            ("shared_memory_limit", lambda _: 227 * 1024),
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(_Recorder, "asked", [])
    monkeypatch.setattr(_Recorder, "launches", [])
    yield _Recorder.asked
    for cached in caches:
        cached.cache_clear()


def _compile_all(nvrtc: Nvrtc, asked: list[tuple[Any, ...]]) -> None:
    distinct = {(source, macros, layout) for source, _, macros, layout, _ in asked}
    headers = {name: kernels._text(name) for name in kernels._HEADERS}
    for source, macros, layout in sorted(distinct, key=str):
        sizes = {"ARGS_BYTES": kernels.struct.calcsize(layout)}
        for target in ARCHITECTURES:
            options = kernels.options_of(dict(macros) | sizes, target)
            image = nvrtc.compile(kernels._text(source + ".cu"), source, headers, options)
            assert image[:4] == b"\x7fELF", f"{source} for {target} is no machine code"


_SCANS = {
    "Vim-Small in bfloat16": {"channels": 768, "rank": 24, "length": 197, "dtype": torch.bfloat16},
    "Vim-Tiny in float16": {"channels": 384, "rank": 12, "length": 197, "dtype": torch.float16},
    "float32": {"channels": 64, "rank": 4},
    "odd sizes, 64 states": {
        "channels": 33,
        "rank": 3,
        "d_state": 64,
        "dtype": torch.bfloat16,
        "directions": 1,
        "backwards": True,
    },
    "8 states, nothing optional": {
        "channels": 5,
        "d_state": 8,
        "gate": False,
        "skip": False,
        "bias": False,
        "softplus": False,
        "a_is_log": False,
        "low_rank": False,
        "parameter_dtype": torch.bfloat16,
    },
}


@pytest.mark.parametrize("name", _SCANS)
def test_the_scan_compiles(
    name: str, nvrtc: Nvrtc, recorded: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = scan_case(**_SCANS[name])
    u, *_ = case.arguments
    frozen = ScanNeeds()
    cuda.scan(*case.arguments, **case.options, save_y=True)
    monkeypatch.setattr(_MODULES[3], "_chunked", lambda *_: None)
    _, y = cuda.scan(*case.arguments, **case.options, save_y=True)
    with monkeypatch.context() as patch:
        patch.setattr(_MODULES[3], "_LONG", 1)  # in pieces
        cuda.scan(*case.arguments, **case.options, save_y=True)
    assert {dict(macros).get("PART") for _, _, macros, *_ in recorded} >= {0, 1, 2}
    for need in (frozen, EVERY_GRADIENT):
        first, rest = case.arguments[:5], case.arguments[5:]
        cuda.scan_backward(case.grad_out, *first, y, *rest, **case.options, need=need)
    sources = {source for source, *_ in recorded}
    fast = u[0].dtype != torch.float32 and u[0].shape[2] % 32 == 0
    assert ("scan_backward_fast" if fast else "scan_backward") in sources
    assert "scan_forward" in sources
    _compile_all(nvrtc, recorded)


def test_the_convolution_compiles(nvrtc: Nvrtc, recorded: list[tuple[Any, ...]]) -> None:
    for dtype, channels, reverse in (
        (torch.bfloat16, 64, (False, True)),
        (torch.float32, 5, (True,)),
    ):
        x = torch.randn(2, 7, 2 * channels, dtype=dtype)[..., :channels]
        weight = tuple(torch.randn(channels, 4) for _ in reverse)
        bias = tuple(torch.randn(channels) for _ in reverse)
        out = cuda.conv_silu(x, weight, bias, reverse)
        for weights in (False, True):
            cuda.conv_silu_backward(
                out, x, weight, bias, reverse, need_x=True, need_weight=weights, need_bias=weights
            )
    for row, dtype, reverse in ((56, torch.bfloat16, (False, True)), (96, torch.float16, (True,))):
        weight = tuple(torch.randn(64, 4) for _ in reverse)
        conv_projected.projected_launch(0, dtype, 2, 7, row, weight, None, reverse)
    _compile_all(nvrtc, recorded)


def test_the_norms_and_prompts_compile(nvrtc: Nvrtc, recorded: list[tuple[Any, ...]]) -> None:
    for dtype, width, rms in ((torch.bfloat16, 384, True), (torch.float32, 13, False)):
        x, weight = torch.randn(2, 7, width, dtype=dtype), torch.randn(width)
        residual = torch.randn(2, 7, width)
        bias = None if rms else weight
        y, total = cuda.add_norm(
            x, residual, weight, bias, eps=1e-5, rms=rms, residual_dtype=torch.float32
        )
        cuda.add_norm_backward(
            y, total, total, weight, eps=1e-5, rms=rms, need_weight=True, need_bias=not rms,
            hidden_dtype=dtype, residual_in_dtype=torch.float32,
        )  # fmt: skip
        cuda.prompt(x, x, x, weight, weight, (3,))
        cuda.prompt_backward(x, x, x, weight, weight, ())
        scales, places = weight.expand(2, width), torch.tensor([1, 0])
        cuda.prompt_rows(x, x[:, None], x[:, None], scales, scales, places, (3,))
    _compile_all(nvrtc, recorded)


def test_the_joint_prompts_compile(
    nvrtc: Nvrtc, recorded: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_MODULES[11], "WIDE_PRODUCTS", False)  # those are for CUDA tensors
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    weights = (64, 64), (64,), (16, 64), (16,), (64, 16), (64,), (64,), (64,)
    tensors = [torch.randn(shape, requires_grad=True) for shape in weights]
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 7, 64, dtype=dtype, requires_grad=True)
        for keep in (False, True):
            cuda.joint_prompt(x, tensors, (3,), torch.bfloat16, keep, None).sum().backward()
    assert "pack" in {source for source, *_ in recorded}
    _compile_all(nvrtc, recorded)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [64, 384])
def test_what_lies_between_two_mixers_of_a_stack_compiles(
    width: int, bias: bool, nvrtc: Nvrtc, recorded: list[tuple[Any, ...]]
) -> None:
    row = torch.ones(width)
    projections = (torch.ones(width, width), row, torch.ones(16, width), row[:16],
                   torch.ones(width, 16), row)  # fmt: skip
    prompt = PromptWeights(projections, row[None], 0, row[None], 0, (3,))
    block = FrozenBlock(None, Cache(), 1.0, row, row if bias else None, 1e-5, not bias, 0.0, prompt)  # type: ignore[arg-type]
    x, residual = torch.randn(2, 7, width).bfloat16(), torch.randn(2, 7, width)
    launches = StackKernels(x, residual, [block])
    joint = torch.randn(14, width + 16).bfloat16()
    packed = Packed(*(x,) * 6)
    for mask in ((0, 1.0), (8, 2.0)):
        launches.add_norm(0, x, residual, mask)
        launches.prompt_norm(0, x, joint, x, residual, mask)
        for keep in (False, True):
            launches.prompt_up_norm(0, x, joint, packed, residual, mask, keep)
        launches.add_norm_backward(0, x, residual, residual, mask, residual)
    partial = torch.empty(launches.partial_sums, 4, width)
    launches.prompt_backward(0, x, joint, x, partial)
    _compile_all(nvrtc, recorded)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("fold", [False, True])
def test_a_frozen_mixer_launches_what_the_general_way_launches(
    fold: bool,
    keep: int,
    directions: int,
    recorded: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    width, inner, rank, state = 32, 64, 8, 16

    def several(*shape: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(shape) for _ in range(directions))

    weights = MixerWeights(
        torch.randn(2 * inner, width), None, several(inner, 4), several(inner),
        several(rank + 2 * state, inner), several(inner, rank), several(inner),
        several(inner, state), several(inner), torch.randn(width, inner), None,
    )  # fmt: skip
    x = torch.randn(2, 37, width, dtype=torch.bfloat16)
    settings = (0.5, torch.bfloat16, "cuda", keep)
    tensors = mixer_passes.pack(weights)
    out, *saved = mixer_passes.forward_pass(x, *tensors, *settings)
    needs = [True] + [False] * len(tensors)
    mixer_passes.backward_pass(out, x, needs, saved, *tensors, *settings)
    general = list(_Recorder.launches)
    _Recorder.launches.clear()
    monkeypatch.setattr(_MODULES[6], "_FOLD", fold)
    mixer = cuda.frozen_mixer(weights, torch.bfloat16, 0.5)
    assert mixer is not None
    out, *kept = mixer.forward(x, keep)
    mixer.backward(out, x, tuple(kept))
    found = list(_Recorder.launches)
    if fold:  # the product before it is in the convolution's kernel
        (source, *_), *_ = found.pop()
        assert source == "conv_backward_projected"
        assert general.pop()[0][:2] == ("conv", "conv_backward")
    assert found == general
    assert len(general) == (5 if keep == 2 else 6) - fold


def test_two_scans_of_one_direction_are_refused_in_our_words(
    recorded: list[tuple[Any, ...]],
) -> None:
    case = scan_case(channels=32, dtype=torch.bfloat16)
    options = case.options | {"reverse": (False, False)}
    with pytest.raises(InputError, match="opposite"):
        cuda.scan(*case.arguments, **options, save_y=False)
    taps = (torch.randn(32, 4),) * 2
    with pytest.raises(InputError, match="opposite"):
        cuda.conv_silu(torch.randn(2, 7, 32), taps, None, (True, True))
    assert not recorded


def test_every_source_is_compiled_by_these_tests() -> None:
    covered = {
        "scan_forward", "scan_forward_chunked", "scan_backward", "scan_backward_fast", "reduce",
        "conv", "conv_backward_projected", "norm", "pack", "prompt", "prompt_norm", "prompt_rows",
        "prompt_up_norm",
    }  # fmt: skip
    assert set(kernels.sources()) == covered


def test_a_wrong_argument_layout_is_a_compile_error(nvrtc: Nvrtc) -> None:
    macros = {"ACT": "float", "D_STATE": 16, "DIRECTIONS": 2, "NEED_B": 1, "NEED_C": 1}
    headers = {name: kernels._text(name) for name in kernels._HEADERS}
    options = kernels.options_of(macros | {"ARGS_BYTES": 8}, "sm_80")
    with pytest.raises(Exception, match="the launcher packs exactly these fields"):
        nvrtc.compile(kernels._text("reduce.cu"), "reduce", headers, options)
