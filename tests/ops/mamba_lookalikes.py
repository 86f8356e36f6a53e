"""Packages that look like mamba-ssm and causal-conv1d, written into a folder for sys.path.

They compute on a CPU what the real ones compute on a GPU, and are as strict as the compiled code is
about dtypes, layouts and the number of arguments. Facts from the releases: causal_conv1d_fwd takes
4 arguments in causal-conv1d 1.0, 5 in 1.1, 7 from 1.2 to 1.5.0, 8 from 1.5.1 on, and the public
causal_conv1d_fn takes more from 1.2 on; mamba-ssm's interface imports triton without a guard from
2.0 on, and its package imports the interface.
"""

from pathlib import Path

RELEASES = {4: "1.0.2", 5: "1.1.1", 7: "1.4.0", 8: "1.6.0"}
"""A release of causal-conv1d by the number of arguments of its compiled function."""

_CONV_CUDA = """
import torch

def causal_conv1d_fwd(*args):
    if len(args) != {arity}:
        raise TypeError("causal_conv1d_fwd(): incompatible function arguments")
    x, weight, bias = args[:3]
    silu = args[-1]
    assert x.dim() == 3 and (x.stride(2) == 1 or x.size(2) == 1), "x must have contiguous tokens"
    assert weight.shape == (x.shape[1], weight.shape[1]) and 2 <= weight.shape[1] <= 4
    assert weight.dtype in (torch.float32, torch.float16, torch.bfloat16), weight.dtype
    assert bias is None or bias.dtype == weight.dtype
    width = weight.shape[1]
    padded = torch.nn.functional.pad(x.float(), (width - 1, 0))
    out = torch.nn.functional.conv1d(
        padded, weight.float()[:, None], None if bias is None else bias.float(),
        groups=weight.shape[0],
    )
    return (torch.nn.functional.silu(out) if silu else out).to(x.dtype)
"""

_CONV = """
import causal_conv1d_cuda

def causal_conv1d_fn({signature}):
    assert activation in (None, "silu", "swish")
    return causal_conv1d_cuda.causal_conv1d_fwd({call})
"""

_CONV_CALLS = {
    4: ("x, weight, bias=None, activation=None", "x, weight, bias, activation is not None"),
    5: ("x, weight, bias=None, activation=None", "x, weight, bias, None, activation is not None"),
    7: (
        "x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, "
        "final_states_out=None, activation=None",
        "x, weight, bias, seq_idx, initial_states, final_states_out, activation is not None",
    ),
    8: (
        "x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, "
        "final_states_out=None, activation=None",
        "x, weight, bias, seq_idx, initial_states, None, final_states_out, activation is not None",
    ),
}

_INTERFACE = """
import torch
{imports}

def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                      return_last_state=False):
    for name, t in dict(u=u, delta=delta, B=B, C=C, z=z).items():
        if t is not None:
            assert t.dtype == u.dtype, (name, t.dtype)
            assert t.stride(-1) == 1 or t.size(-1) == 1, (name, t.stride())
    for name, t in dict(A=A, D=D, delta_bias=delta_bias).items():
        assert t is None or t.dtype == torch.float32, (name, t.dtype)
    batch, d_inner, length = u.shape
    assert B.shape == C.shape == (batch, A.shape[1], length)
    x = u.float()
    step = delta.float() if delta_bias is None else delta.float() + delta_bias[:, None]
    step = torch.nn.functional.softplus(step) if delta_softplus else step
    h, y = x.new_zeros(batch, d_inner, A.shape[1]), []
    for t in range(length):
        decay = torch.exp(step[:, :, t, None] * A)
        h = decay * h + (step[:, :, t] * x[:, :, t])[..., None] * B[:, None, :, t].float()
        y.append((h * C[:, None, :, t].float()).sum(-1))
    out = torch.stack(y, -1)
    out = out if D is None else out + D[:, None] * x
    out = out if z is None else out * torch.nn.functional.silu(z.float())
    return out.to(u.dtype)

def mamba_inner_fn(*args):
    raise AssertionError("the fused path knows one direction only")
{extra}
"""


def write_causal_conv1d(root: Path, arity: int = 7, *, broken: bool = False) -> None:
    """A causal-conv1d whose compiled function takes `arity` arguments."""
    signature, call = _CONV_CALLS[arity]
    cuda = _CONV_CUDA.format(arity=arity)
    if broken:
        cuda = "raise ImportError('causal_conv1d_cuda.so: undefined symbol: _ZN3c104cudaE')"
    (root / "causal_conv1d_cuda.py").write_text(cuda)
    package = root / "causal_conv1d"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn\n"
    )
    (package / "causal_conv1d_interface.py").write_text(
        _CONV.format(signature=signature, call=call)
    )
    _metadata(root, "causal_conv1d", RELEASES[arity])


def write_mamba_ssm(
    root: Path,
    version: str = "2.2.2",
    *,
    mixer_arguments: str = "d_model, d_state=16, d_conv=4, expand=2",
    interface_extra: str = "",
    imports: str = "",
) -> None:
    """A mamba-ssm; a fork where `mixer_arguments` or `interface_extra` are a fork's."""
    package = root / "mamba_ssm"
    (package / "ops").mkdir(parents=True)
    (package / "modules").mkdir()
    (package / "ops" / "__init__.py").write_text("")
    (package / "modules" / "__init__.py").write_text("")
    (package / "__init__.py").write_text(
        "from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, mamba_inner_fn\n"
        "from mamba_ssm.modules.mamba_simple import Mamba\n"
    )
    (package / "ops" / "selective_scan_interface.py").write_text(
        _INTERFACE.format(imports=imports, extra=interface_extra)
    )
    (package / "modules" / "mamba_simple.py").write_text(
        f"class Mamba:\n    def __init__(self, {mixer_arguments}):\n        pass\n"
    )
    _metadata(root, "mamba_ssm", version)


def _metadata(root: Path, name: str, version: str) -> None:
    folder = root / f"{name}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
