"""Random scans with the value ranges of real checkpoints, and what the kernels' tests share."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from svp_peft.ops import reference
from svp_peft.ops.types import MixerWeights, ScanNeeds

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERY_GRADIENT = ScanNeeds(*(True,) * 9)


class Case(NamedTuple):
    """Arguments of one scan, in the order and the layout of `scan`."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    grad_out: Tensor


def scan_case(
    batch: int = 2,
    length: int = 13,
    channels: int = 32,
    d_state: int = 16,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    directions: int = 2,
    backwards: bool = False,
    gate: bool = True,
    skip: bool = True,
    bias: bool = True,
    softplus: bool = True,
    a_is_log: bool = True,
    low_rank: bool = True,
    parameter_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """A scan whose delta reaches from 1e-4 to above 20 and whose A from -1e-3 to -50.

    dt, B and C are slices of one x_dbl and z is half of xz, as in the mixer.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    def activation(x: Tensor) -> Tensor:
        return x.to(device, dtype)

    def parameter(x: Tensor) -> Tensor:
        return x.to(device, parameter_dtype)

    each = range(directions)
    width = rank if low_rank else channels
    x_dbl = [activation(normal(batch, length, width + 2 * d_state)) for _ in each]
    # most steps are between 1e-4 and 1; one channel in eight is far above softplus' threshold
    centre = uniform(-9.0, 0.0, channels)
    centre[::8] = uniform(0.0, 24.0, len(centre[::8]))
    weight = tuple(parameter(normal(channels, rank) * rank**-0.5) for _ in each)
    rate = [torch.exp(uniform(-6.9, 3.9, channels, d_state)) for _ in each]
    if not softplus:  # delta is then used as it is, and must not make the states explode
        for slab in x_dbl:
            slab[..., :width] = slab[..., :width].abs() * 0.1
        weight = tuple(w.abs() for w in weight)
        centre = centre.abs() * 0.01 + 0.5  # the bias below stays positive
    z = activation(2 * normal(batch, length, 2 * channels))[..., channels:]
    arguments = (
        tuple(activation(normal(batch, length, channels)) for _ in each),
        tuple(slab[..., :width] for slab in x_dbl),
        tuple(slab[..., width : width + d_state] for slab in x_dbl),
        tuple(slab[..., width + d_state :] for slab in x_dbl),
        z if gate else None,
        tuple(parameter(torch.log(a) if a_is_log else -a) for a in rate),
        tuple(parameter(normal(channels)) for _ in each) if skip else None,
        weight if low_rank else None,
        tuple(parameter(centre + 0.1 * normal(channels)) for _ in each) if bias else None,
    )
    options = {
        "reverse": (backwards, not backwards)[:directions],
        "softplus": softplus,
        "scale": 0.5 if directions == 2 else 1.0,
        "A_is_log": a_is_log,
    }
    return Case(arguments, options, activation(normal(batch, length, channels)))


def mixer_weights(
    d_model: int,
    rank: int,
    state: int,
    directions: int,
    *,
    convolutions: int | None = None,
    bias: bool = False,
    device: str = "cpu",
) -> MixerWeights:
    """Float32 weights of a block of width `d_model`; one convolution per direction by default."""
    d_inner = 2 * d_model
    convolutions = directions if convolutions is None else convolutions
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(device)

    def several(
        *shape: int, scale: float = 1.0, shift: float = 0.0, count: int = convolutions
    ) -> tuple[Tensor, ...]:
        return tuple(draw(*shape, scale=scale) + shift for _ in range(count))

    ramp = torch.arange(1, state + 1).log().to(device)
    return MixerWeights(
        in_proj_weight=draw(2 * d_inner, d_model, scale=d_model**-0.5),
        in_proj_bias=draw(2 * d_inner, scale=0.1) if bias else None,
        conv_weight=several(d_inner, 4, scale=0.5),
        conv_bias=several(d_inner, scale=0.2),
        x_proj_weight=several(rank + 2 * state, d_inner, scale=d_inner**-0.5),
        dt_weight=several(d_inner, rank, scale=rank**-0.5),
        dt_bias=several(d_inner, scale=1.5, shift=-4.0),
        A_log=tuple(ramp + 0.3 * a for a in several(d_inner, state, count=directions)),
        D=several(d_inner, scale=0.3, shift=1.0),
        out_proj_weight=draw(d_model, d_inner, scale=d_inner**-0.5),
        out_proj_bias=draw(d_model, scale=0.1) if bias else None,
    )


def map_tensors(value: Any, function: Any) -> Any:
    """`value` with `function` applied to every tensor in its tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(map_tensors(v, function) for v in value)
    return value


def scan_truth(case: Case) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(out, y, gradients by name) of the reference in float64 on the very same inputs."""
    leaves = map_tensors(case.arguments, lambda t: t.detach().double().requires_grad_())
    out, y = reference.scan(*leaves, **case.options)
    names = ("du", "ddt", "dB", "dC", "dz", "dA", "dD", "ddt_weight", "ddt_bias")
    flat = [t for value in leaves if value is not None for t in _flatten(value)]
    found = iter(torch.autograd.grad(out, flat, case.grad_out.double()))
    gradients = {
        name: map_tensors(value, lambda _: next(found))
        for name, value in zip(names, leaves, strict=True)
    }
    return out.detach(), y.detach(), gradients


def _flatten(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def error(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth||; NaN anywhere gives NaN, which no bound admits."""
    truth = truth.double()
    scale = truth.norm().clamp_min(1e-30)
    return ((found.double() - truth).norm() / scale).item()
