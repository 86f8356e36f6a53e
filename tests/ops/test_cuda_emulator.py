"""The emulator of CUDA: its arithmetic is that of the instructions, and it notices what is wrong.

The kernels here are a few lines each; that it runs the library's own is test_cuda_on_cpu.py.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from svp_peft.errors import BackendError
from svp_peft.ops.cuda import kernels
from tests.ops.cuda_cases import EVERY_GRADIENT, scan_case
from tests.ops.cuda_checks import backward
from tests.ops.cuda_on_cpu.emulator import ORDERS, translate
from tests.ops.cuda_on_cpu.gpu import EmulatedGpu

Launch = Callable[..., None]


@pytest.fixture
def launch(gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch) -> Launch:
    """Runs the body of a kernel on float tensors: `in` is read, `out` written, `n` given."""

    def run(
        body: str,
        given: Tensor,
        out: Tensor,
        *,
        n: int = 0,
        threads: int = 64,
        blocks: int = 1,
        shared: int = 0,
    ) -> None:
        source = (
            '#include "common.cuh"\n'
            "struct Args { const float* in; float* out; int n; };\n"
            'extern "C" __global__ void __launch_bounds__(64) small(const Args args) {\n'
            "  const float* in = args.in; float* out = args.out; const int n = args.n;\n"
            f"  const int t = threadIdx.x, lane = t % 32; (void)lane; (void)n;\n{body}\n}}\n"
        )
        originals = {name: kernels._text(name) for name in kernels._HEADERS}
        monkeypatch.setattr(kernels, "_text", (originals | {"small.cu": source}).__getitem__)
        kernel = kernels.Kernel("small", "small", {}, "QQi4x", 0, threads=threads, shared=shared)
        kernel((blocks, 1, 1), given.data_ptr(), out.data_ptr(), n)

    return run


def words(values: Tensor) -> Tensor:
    """Bit patterns as the floats that a kernel is given."""
    return values.view(torch.float32)


# ------------------------------------------------------------------------------------- arithmetic


def test_numbers_become_halves_and_back_as_in_torch(launch: Launch) -> None:
    every_half = torch.arange(1 << 16, dtype=torch.int32)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        wide = torch.empty(1 << 16)
        launch(
            f"for (int i = t; i < n; i += 64) "
            f"out[i] = widen({name}{{(u16)__float_as_uint(in[i])}});",
            words(every_half), wide, n=1 << 16,
        )  # fmt: skip
        torch.testing.assert_close(
            wide, every_half.to(torch.int16).view(dtype).float(), rtol=0, atol=0, equal_nan=True
        )
        between = torch.cat([
            (wide[:-1] + wide[1:]) / 2,  # ties
            torch.randn(9999) * 10 ** torch.linspace(-9, 6, 9999),
        ])  # fmt: skip
        found = torch.empty_like(between)
        launch(
            f"for (int i = t; i < n; i += 64) out[i] = widen(narrowed<{name}>(in[i]));",
            between, found, n=len(between),
        )  # fmt: skip
        expected = between.to(dtype).float()
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["bf16", "fp16", "tf32"])
def test_a_tensor_core_multiplies_matrices(name: str, launch: Launch) -> None:
    # the layout of the operands is that of the PTX manual: group = lane / 4, q = lane % 4
    wide = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
    k = 8 if wide is None else 16
    a, b, c = torch.randn(16, k), torch.randn(k, 8), torch.randn(16, 8)
    if wide is None:
        a, b = ((x.view(torch.int32) & -(1 << 13)).view(torch.float32) for x in (a, b))
        multiply = (
            "mma_8(c, A[g * 8 + q], A[(g + 8) * 8 + q], A[g * 8 + q + 4], A[(g + 8) * 8 + q + 4],"
            " B[q * 8 + g], B[(q + 4) * 8 + g]);"
        )
    else:
        a, b = a.to(wide).float(), b.to(wide).float()
        multiply = f"""
        auto pair = [&](const float* m, int at, int next) {{
          return narrowed<{name}>(m[at]).bits | (u32)narrowed<{name}>(m[at + next]).bits << 16;
        }};
        mma_16({name}{{}}, c, pair(A, g * 16 + 2 * q, 1), pair(A, (g + 8) * 16 + 2 * q, 1),
               pair(A, g * 16 + 2 * q + 8, 1), pair(A, (g + 8) * 16 + 2 * q + 8, 1),
               pair(B, 2 * q * 8 + g, 8), pair(B, (2 * q + 8) * 8 + g, 8));"""
    found = torch.empty(2, 16, 8)
    launch(
        f"""const float *A = in, *B = in + n, *C = B + n / 2;
        const int g = lane / 4, q = lane % 4;
        float c[4];
        for (int i = 0; i < 4; i++) c[i] = C[(g + i / 2 * 8) * 8 + 2 * q + i % 2];
        {multiply}
        float* to = out + t / 32 * 128;
        for (int i = 0; i < 4; i++) to[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = c[i];""",
        torch.cat([x.flatten() for x in (a, b, c)]), found, n=16 * k,
    )  # fmt: skip
    expected = c.double() + a.double() @ b.double()
    for warp in found:
        torch.testing.assert_close(warp.double(), expected, rtol=1e-6, atol=1e-6)


def test_shuffles_take_the_value_of_the_right_lane(launch: Launch) -> None:
    out = torch.empty(4, 64)
    launch(
        "const float v = in[t];"
        "out[t] = __shfl_xor_sync(~0u, v, 5);"
        "out[64 + t] = __shfl_sync(~0u, v, 7);"
        "out[128 + t] = __shfl_up_sync(~0u, v, 3);"
        "out[192 + t] = __shfl_down_sync(~0u, v, 3);",
        torch.arange(64.0), out,
    )  # fmt: skip
    lane = torch.arange(64) % 32
    warp = torch.arange(64) // 32 * 32
    expected = [lane ^ 5, 0 * lane + 7, (lane - 3).where(lane >= 3, lane), lane + 3]
    expected[3] = expected[3].where(lane < 29, lane)
    assert torch.equal(out, torch.stack([e + warp for e in expected]).float())


def test_fast_functions_flush_what_is_below_the_normal_numbers(launch: Launch) -> None:
    tiny = 1e-40
    out = torch.full((4,), -1.0)
    launch(
        "if (t == 0) { out[0] = ex2(-140.f); out[1] = rcp(in[0]); out[2] = lg2(in[0]); "
        "out[3] = rcp(3e38f); }",
        torch.tensor([tiny]), out,
    )  # fmt: skip
    assert out.tolist() == [0.0, float("inf"), float("-inf"), 0.0]


# ----------------------------------------------------------------------- it notices what is wrong

WRONG = {
    "a barrier of the block is missing": (
        "__shared__ float s[64]; s[t] = in[t]; __syncwarp(); out[t] = s[63 - t];",
        "a race: (reads|writes) what thread",
    ),
    "a barrier of the warp is missing": (
        "__shared__ float s[64]; s[t] = in[t]; out[t] = s[t ^ 1];",
        "a race: (reads|writes) what thread",
    ),
    "a barrier is missing before memory is used again": (
        "__shared__ float s[64]; s[t] = in[t]; __syncthreads(); out[t] = s[63 - t]; s[t] = 0.f;",
        r"a race: (reads|writes) what thread \d+ of block 0 (read|wrote)",
    ),
    "two blocks write one number": (
        "out[t] = in[t];",
        "a race: writes what thread .* of block [01] wrote",
    ),
    "a shuffle orders no memory": (
        "__shared__ float s[64]; s[t] = in[t]; __shfl_sync(~0u, 1.f, 0); out[t] = s[t ^ 1];",
        "a race",
    ),
    "a copy is read by a lane that did not issue it": (
        "__shared__ float s[64]; copy_async<4>(s + t, in + t); copies_commit(); copies_wait<0>();"
        "out[t] = s[t ^ 1];",
        "a race",
    ),
    "a copy overtakes a reader": (
        "__shared__ float s[64]; s[t] = in[t]; __syncthreads(); out[t] = s[63 - t];"
        "copy_async<4>(s + t, in + t); copies_commit(); copies_wait<0>();",
        "a race",
    ),
    "a read outside of a tensor": ("out[t] = in[t + 1];", "reads 4 bytes outside of every tensor"),
    "a write outside of a tensor": ("out[64 - t] = in[t];", "writes 4 bytes outside of every"),
    "a write behind dynamic shared memory": (
        "extern __shared__ float4 all[]; float* s = (float*)all; s[t + 1] = in[t]; out[t] = 0.f;",
        "writes 4 bytes behind its dynamic shared memory",
    ),
    "an index outside of an array": (
        "__shared__ float s[2][32]; s[t / 32][t % 32 + n] = in[t]; out[t] = 0.f;",
        "small.cu:6: the index 32 is outside of its array",
    ),
    "an access that is not aligned": (
        "if (t < 31) *(double*)(out + 2 * t) = *(const double*)(in + 2 * t + 1);",
        "reads 8 bytes at .* no multiple of it",
    ),
    "a copy that is not aligned": (
        "__shared__ float4 s[64]; if (t < 15) copy_async<16>(s + t, in + 4 * t + 1);"
        "copies_commit(); copies_wait<0>(); out[t] = 0.f;",
        "an asynchronous copy of 16 bytes from .* no multiple",
    ),
    "a warp that is split at a shuffle": (
        "float v = in[t]; if (lane < 16) v = __shfl_xor_sync(~0u, v, 1); out[t] = v;",
        "the warp is split: this thread is at (its end|a shuffle)",
    ),
    "a barrier of the block in one half of a warp": (
        "if (lane < 16) __syncthreads(); else __syncwarp(); out[t] = in[t];",
        "the warp is split: this thread is at (__syncthreads|__syncwarp)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", WRONG)
def test_it_is_an_error_that(name: str, order: str, gpu: EmulatedGpu, launch: Launch) -> None:
    body, message = WRONG[name]
    gpu.order = order
    blocks = 2 if "two blocks" in name else 1
    with pytest.raises(BackendError, match=message):
        launch(body, torch.randn(64), torch.empty(64), n=1, blocks=blocks, shared=256)


@pytest.mark.parametrize("order", ORDERS)
def test_what_the_barriers_allow_is_no_error(order: str, gpu: EmulatedGpu, launch: Launch) -> None:
    gpu.order = order
    given, out = torch.randn(64), torch.empty(64)
    launch(
        """extern __shared__ float4 all[];
        float* s = (float*)all;
        copy_async<4>(s + t, in + t);
        copies_commit();
        copies_wait<0>();
        __syncwarp();
        const float other = s[t ^ 1];
        __syncwarp();
        s[t] = other;
        __syncthreads();
        const float far = s[63 - t];
        __syncthreads();
        s[t ^ 32] = far;
        __syncthreads();
        out[t] = s[t];""",
        given, out, shared=256,
    )  # fmt: skip
    t = torch.arange(64)
    assert torch.equal(out, given[(63 - (t ^ 32)) ^ 1])


def test_memory_that_nobody_has_written_is_nan(launch: Launch) -> None:
    out = torch.zeros(3, 64)
    launch(
        """extern __shared__ float4 all[];
        __shared__ float s[64];
        __shared__ bf16 h[64];
        out[t] = s[t];
        out[64 + t] = ((float*)all)[t];
        out[128 + t] = widen(h[t]);""",
        torch.empty(1), out, shared=256,
    )  # fmt: skip
    assert out.isnan().all()


def test_a_copy_arrives_when_it_is_waited_for(launch: Launch) -> None:
    given, out = torch.randn(64), torch.zeros(3, 64)
    launch(
        """__shared__ float s[2][64];
        copy_async<4>(&s[0][t], in + t);
        copies_commit();
        copy_async_if<4>(&s[1][t], in + t, t % 2);
        copies_commit();
        out[t] = s[0][t];
        copies_wait<1>();
        out[64 + t] = s[0][t] + 0.f * (s[1][t] == s[1][t]);
        copies_wait<0>();
        out[128 + t] = s[1][t];""",
        given, out,
    )  # fmt: skip
    assert out[0].isnan().all()
    assert torch.equal(out[1], given)
    assert torch.equal(out[2], given * (torch.arange(64) % 2))


def test_more_threads_than_the_launch_bounds_are_refused(launch: Launch) -> None:
    with pytest.raises(BackendError, match="its __launch_bounds__ are 64"):
        launch("out[t] = in[t];", torch.randn(96), torch.empty(96), threads=96)


def test_a_launch_after_a_failed_one_works(launch: Launch) -> None:
    given, out = torch.randn(64), torch.empty(64)
    body = "__shared__ float s[64]; if (n || lane < 9) __syncwarp(); s[t] = in[t]; out[t] = s[t];"
    with pytest.raises(BackendError, match="split"):
        launch(body, given, out)
    launch(body, given, out, n=1)
    assert torch.equal(out, given)


def test_an_instruction_that_is_not_emulated_is_named() -> None:
    call = translate('asm volatile("fence.proxy.async.shared %0;" ::"r"(f(x[1])) : "memory");')
    assert call.strip() == "ptx_fence_proxy_async_shared((f(x[1])));"
    with pytest.raises(ValueError, match="one instruction with its operands in order"):
        translate('asm("add.f32 %0, %2, %1;" : "=f"(a) : "f"(b), "f"(c));')


# one line of a kernel that matters, and what stands in its place
DAMAGED = {
    "no wait for the copies": ("copies_wait<0>();\n    __syncwarp();", "__syncwarp();"),
    "no barrier after the widened rows": (
        "if (s > 0) finish_load();\n    __syncthreads();",
        "if (s > 0) finish_load();",
    ),
    "no barrier before the sums are added up": (
        "    __syncthreads();\n    if constexpr (NEED_C)",
        "    if constexpr (NEED_C)",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_scan_does_not_go_unnoticed(
    name: str, gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    intact, damaged = DAMAGED[name]
    text = kernels._text

    def changed(file: str) -> str:
        if file != "scan_backward_fast.cu":
            return text(file)
        assert intact in text(file)
        return text(file).replace(intact, damaged)

    case = scan_case(1, 21, 64, 16, 8, torch.bfloat16)
    backward(case, EVERY_GRADIENT)
    monkeypatch.setattr(kernels, "_text", changed)
    gpu.forget_kernels()
    if "wait" in name:
        assert backward(case, EVERY_GRADIENT).dz.isnan().any()
    else:
        with pytest.raises(BackendError, match="a race"):
            backward(case, EVERY_GRADIENT)
