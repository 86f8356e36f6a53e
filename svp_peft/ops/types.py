"""What a backward pass of the scan is asked for, and what it returns."""

from typing import NamedTuple

from torch import Tensor


class ScanNeeds(NamedTuple):
    """Which gradients of the scan are wanted; a frozen backbone wants the first five at most."""

    u: bool = True
    dt: bool = True
    B: bool = True
    C: bool = True
    z: bool = True
    A: bool = False
    D: bool = False
    dt_weight: bool = False
    dt_bias: bool = False


class ScanGrads(NamedTuple):
    """Gradients of the scan, one tensor per direction (`dz` is shared); None where not asked for.

    `dA` is the gradient with respect to `A_log` where `A_is_log`, else with respect to `A` itself.
    """

    du: tuple[Tensor, ...] | None
    ddt: tuple[Tensor, ...] | None
    dB: tuple[Tensor, ...] | None
    dC: tuple[Tensor, ...] | None
    dz: Tensor | None
    dA: tuple[Tensor, ...] | None
    dD: tuple[Tensor, ...] | None
    ddt_weight: tuple[Tensor, ...] | None
    ddt_bias: tuple[Tensor, ...] | None
