"""What the ops exchange: the weights of a mixer, and which gradients of a scan are wanted."""

from typing import Any, NamedTuple

from torch import Tensor


class MixerWeights(NamedTuple):
    """The tensors of one Vim mixer, per direction where a field is a tuple.

    One or two convolutions and one or two scans:

        bimamba "none"   one convolution, one scan
        bimamba "v1"     one convolution, two scans: the second runs backwards over the same inputs
                         with an A of its own
        bimamba "v2"     two convolutions, two scans: the second of each runs backwards
    """

    in_proj_weight: Tensor
    """(2 * d_inner, d_model): the first half makes x, the second the gate z."""
    in_proj_bias: Tensor | None
    conv_weight: tuple[Tensor, ...]
    """Per convolution, (d_inner, width)."""
    conv_bias: tuple[Tensor, ...] | None
    """Per convolution, (d_inner,)."""
    x_proj_weight: tuple[Tensor, ...]
    """Per convolution, (dt_rank + 2 * d_state, d_inner)."""
    dt_weight: tuple[Tensor, ...]
    """Per convolution, (d_inner, dt_rank)."""
    dt_bias: tuple[Tensor, ...]
    """Per convolution, (d_inner,)."""
    A_log: tuple[Tensor, ...]
    """Per scan, (d_inner, d_state); A = -exp(A_log)."""
    D: tuple[Tensor, ...]
    """Per convolution, (d_inner,)."""
    out_proj_weight: Tensor
    """(d_model, d_inner)."""
    out_proj_bias: Tensor | None

    @property
    def conv_reverse(self) -> tuple[bool, ...]:
        """Per convolution, whether it looks at the tokens after t."""
        return (False, True)[: len(self.conv_weight)]

    @property
    def scan_reverse(self) -> tuple[bool, ...]:
        """Per scan, whether it runs from the last token to the first."""
        return (False, True)[: len(self.A_log)]

    @property
    def source_of_direction(self) -> tuple[int, ...]:
        """Per scan, the index of the convolution that it reads."""
        return tuple(min(k, len(self.conv_weight) - 1) for k in range(len(self.A_log)))


class Cache:
    """What a module keeps between its calls of an op, so that the op is fast on a slow host.

    A copy or a pickle of it is empty: the copied module has weights of its own.
    """

    def __init__(self) -> None:
        self.prepared: Any = None
        """Whatever a backend made of the module's weights."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Cache":
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


class PromptWeights(NamedTuple):
    """What the two prompts of one block are made of; symbols as in `svp_peft.ops.svp_prompt`."""

    projections: tuple[Tensor, ...]
    """W, b, D, c, U, d."""
    alpha: Tensor
    """The scales of all cross prompts, stacked: (groups, d_model)."""
    alpha_row: int
    beta: Tensor
    """The scales of all inner prompts, stacked: (depth, d_model)."""
    beta_row: int
    skip: tuple[int, ...]
    """Positions of the class tokens."""


class FrozenBlock(NamedTuple):
    """One frozen block of a stack: prompt, drop, add, normalise, mix."""

    mixer: MixerWeights
    mixer_cache: Cache
    mixer_scale: float
    norm_weight: Tensor
    norm_bias: Tensor | None
    eps: float
    rms: bool
    drop_rate: float
    """Probability that an image's share of the residual stream is dropped; 0 in evaluation."""
    prompt: PromptWeights | None


class StackKeep(NamedTuple):
    """What a forward pass over a stack of blocks keeps for the backward pass."""

    first: int
    """Index of the first block that needs a backward pass."""
    mixer: int
    """See `svp_peft.ops.mixer_passes`."""
    prompts: bool
    """Whether the pre-activations of the prompts are kept; otherwise they are computed again."""


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
