"""Compile every Triton kernel for one architecture, without a GPU; print their names.

    python -m tests.ops.triton_compile 90

The launchers run on CPU tensors; where they would launch a kernel it is compiled instead, with the
arguments they give. Run by test_triton.py in a process of its own.
"""

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from svp_peft.ops import triton
from svp_peft.ops.types import ScanNeeds
from tests.ops.cuda_cases import EVERY_GRADIENT, scan_case

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
ARCHITECTURE = int(sys.argv[1])


def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
    options = {"num_warps": settings.pop("num_warps")}
    values = dict(zip(self.arg_names, args, strict=False)) | settings
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(self.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(self, signature, constants, attributes)
    compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=options)
    print(self.fn.__name__)


def main() -> None:
    JITFunction.run = compile_instead
    dtype = torch.bfloat16
    for batch in (1, 16):  # the parallel and the sequential scan
        case = scan_case(batch, 33, 768, 16, 24, dtype)
        triton.scan(*case.arguments, **case.options, save_y=True)
    first, rest = case.arguments[:5], case.arguments[5:]
    for need in (ScanNeeds(), EVERY_GRADIENT):
        triton.scan_backward(case.grad_out, *first, case.grad_out, *rest, **case.options, need=need)
    u = case.arguments[0]
    x = torch.zeros(16, 33, 1536, dtype=dtype)[..., :768]
    weight, vector = torch.zeros(768, 4), torch.zeros(768)
    both = (False, True)
    triton.conv_silu(x, (weight, weight), (vector, vector), both)
    triton.conv_silu_backward(
        u, x, (weight, weight), (vector, vector), both,
        need_x=True, need_weight=False, need_bias=False,
    )  # fmt: skip
    triton.conv_silu_backward(
        u[:1], x, (weight,), None, (False,), need_x=False, need_weight=True, need_bias=False
    )
    hidden = u[0]
    y, total = triton.add_norm(
        hidden, hidden, vector, None, eps=1e-5, rms=True, residual_dtype=torch.float32
    )
    triton.add_norm_backward(
        y, total, total, vector, eps=1e-5, rms=False, need_weight=True, need_bias=True,
        hidden_dtype=dtype, residual_in_dtype=torch.float32,
    )  # fmt: skip
    triton.prompt(hidden, hidden, hidden, vector, vector, (16,))
    triton.prompt_backward(hidden, hidden, hidden, vector, vector, (16,))


if __name__ == "__main__":
    main()
