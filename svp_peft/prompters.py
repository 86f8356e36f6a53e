"""THE METHOD: Selective Visual Prompting (AAAI 2025, arXiv 2412.08947).

Before every block of a frozen Vision Mamba, each token but the class tokens gets a prompt made
from itself:

    x'_t = x_t + alpha_g * G_C,g(x_t) + beta_l * G_I,l(x_t)

    G_C,g(x) = SiLU(W_g x + b_g)                cross prompter, shared by the blocks of group g
    G_I,l(x) = SiLU(U_l (D_l x + c_l) + d_l)    inner prompter of block l

    l         index of the block, 0..depth-1
    g         l // cross_group_size, counted anew wherever the width of the blocks changes
    alpha_g   learned scale, (d_model,), zero at first
    beta_l    learned scale, (d_model,), zero at first

With zero scales the prompted model equals the base model bit for bit. x is the first argument of
the block: in Vim the output of the previous mixer, not the residual stream.

Shapes in this file.

batch    images in the batch
L        tokens, class tokens included (197 for Vim at 224 px)
d_model  token width (384 for Vim-S)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp_peft.config import SVPConfig
from svp_peft.errors import ConfigError, InputError
from svp_peft.ops import Cache, PromptWeights, svp_prompt, svp_prompt_released
from svp_peft.vim.bare import is_hooked

_SIMAM_LAMBDA = 1e-3


class InnerPrompter(nn.Module):
    """G_I(x) = SiLU(U (D x + c) + d): a linear bottleneck of one block; float (..., d_model)."""

    def __init__(self, d_model: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(d_model, bottleneck)
        self.up = nn.Linear(bottleneck, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.up(self.down(x)))


class CrossPrompter(nn.Linear):
    """G_C(x) = SiLU(W x + b): shared by the blocks of one group; float (..., d_model)."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class NamedModules(nn.Module):
    """Submodules under any name or number.

    nn.ModuleDict refuses names such as "train" or "keys", and nn.ModuleList cannot leave out an
    index. Names that a module's own attributes use are stored with a trailing "/".
    """

    def __getitem__(self, name: str | int) -> nn.Module:
        # nearly every name is stored as it is, and every block asks
        module = self._modules.get(str(name))
        if module is None:
            module = self._modules[self._key(name)]
        assert module is not None
        return module

    def __setitem__(self, name: str | int, module: nn.Module) -> None:
        # a new dict each time: another thread may be iterating over the parameters
        self._modules = {**self._modules, self._key(name): module}

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, (str, int)) or str(name).endswith("/"):
            return False  # "train/" is how "train" is stored, not a name
        return self._key(name) in self._modules

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return (module for module in self._modules.values() if module is not None)

    def names(self) -> list[str]:
        """Names in the order of insertion."""
        return [key.removesuffix("/") for key in self._modules]

    def pop(self, name: str | int) -> nn.Module:
        """Take the module out and return it."""
        module = self[name]
        key = self._key(name)
        self._modules = {k: m for k, m in self._modules.items() if k != key}
        return module

    def _key(self, name: str | int) -> str:
        name = str(name).replace(".", "/")
        return f"{name}/" if hasattr(type(self), name) or name in self.__dict__ else name


class _Place(NamedTuple):
    """Where the parts of one block's prompt are."""

    group: int
    stage: int
    alpha_row: int
    beta_row: int


class SVPAdapter(nn.Module):
    """All prompters and scales of one adapter.

    Attributes:
        inner: InnerPrompter of each prompted block, by block index.
        cross: CrossPrompter of each group that has a prompted block, by group index.
        alpha: learned scales of the cross prompts, (groups, d_model).
        beta: learned scales of the inner prompts, (depth, d_model).

    alpha and beta keep a row for every group and block, prompted or not, so that row l belongs to
    block l; rows without a prompter stay zero. Where the width changes between blocks they are
    nn.ParameterLists with one tensor per run of equal width. Scales are stacked in 2-D tensors
    because optimizers commonly exempt 1-D ones from weight decay, and the released training
    decays them. Without cross (inner) prompters there is no alpha (beta).

    Args:
        d_model: token width, or the width of every block.
        depth: number of blocks.
        config: see `SVPConfig`.

    Raises:
        ConfigError: `config` does not fit the stack of blocks.
    """

    alpha: nn.Parameter | nn.ParameterList | None
    beta: nn.Parameter | nn.ParameterList | None

    def __init__(self, d_model: int | Sequence[int], depth: int, config: SVPConfig) -> None:
        super().__init__()
        widths = (d_model,) * depth if isinstance(d_model, int) else tuple(d_model)
        assert len(widths) == depth
        check_config_fits(config, widths)
        self.config = config
        self.dropout = config.dropout
        self.released = config.cross_source == "released"
        self.layers = frozenset(range(depth) if config.layers is None else config.layers)
        self._places = _places(widths, config.cross_group_size)

        self.inner = NamedModules()
        self.cross = NamedModules()
        for index in sorted(self.layers):
            if config.use_inner:
                self.inner[index] = InnerPrompter(widths[index], config.inner_bottleneck)
            group = self._places[index].group
            if config.use_cross and group not in self.cross:
                self.cross[group] = CrossPrompter(widths[index])
        groups: dict[int, list[int]] = {}
        blocks: dict[int, list[int]] = {}
        for width, place in zip(widths, self._places, strict=True):
            groups[place.stage] = [place.alpha_row + 1, width]
            blocks[place.stage] = [place.beta_row + 1, width]
        self.alpha = _zero_scales(list(groups.values())) if config.use_cross else None
        self.beta = _zero_scales(list(blocks.values())) if config.use_inner else None
        self._caches = tuple(Cache() for _ in widths)
        self._alpha_rows, self._beta_rows = _Rows(), _Rows()
        self._first, self._last = min(self.layers, default=0), max(self.layers, default=0)

    def forward(self, x: Tensor, block_index: int, skip: Sequence[int] = ()) -> Tensor:
        """Tokens entering block `block_index`, float (batch, L, d_model) -> prompted tokens.

        Args:
            skip: positions of the class tokens, sorted, each in 0..L-1.

        Returns:
            Same shape and dtype as `x`, which is not modified.

        Raises:
            InputError: `cross_source="released"` and the class token is not right in the middle.
        """
        if block_index not in self.layers:
            return x
        cross, inner, alpha, beta = self.parts(block_index)
        down, up = (None, None) if inner is None else (inner.down, inner.up)
        weights = (
            None if cross is None else cross.weight,
            None if cross is None else cross.bias,
            None if down is None else down.weight,
            None if down is None else down.bias,
            None if up is None else up.weight,
            None if up is None else up.bias,
            alpha,
            beta,
        )
        if self.released:
            if len(skip) != 1 or x.shape[1] != 2 * skip[0] + 1:
                raise InputError(
                    f"cross_source='released' needs as many tokens before the class token as after "
                    f"it, but there are {x.shape[1]} tokens with class tokens at {tuple(skip)}: "
                    "the authors' code fails on them too. Use an image size with an even number "
                    "of patches, or cross_source='token'."
                )
            return svp_prompt_released(
                x,
                *weights,  # type: ignore[arg-type]  # "released" always has both prompters
                position=skip[0],
                dropout=self.dropout,
                training=self.training,
            )
        return svp_prompt(
            x,
            *weights,
            skip=skip,
            dropout=self.dropout,
            training=self.training,
            cache=self._caches[block_index],
        )

    def parts(
        self, block_index: int
    ) -> tuple[CrossPrompter | None, InnerPrompter | None, Tensor | None, Tensor | None]:
        """(cross prompter, inner prompter, alpha row, beta row) of a prompted block."""
        place = self._places[block_index]
        alphas, betas = self.alpha, self.beta
        cross = self.cross[place.group] if alphas is not None else None
        inner = self.inner[block_index] if betas is not None else None
        ends = (block_index == self._first, block_index == self._last)
        alpha = _row(alphas, place.stage, place.alpha_row, self._alpha_rows, ends)
        beta = _row(betas, place.stage, place.beta_row, self._beta_rows, ends)
        return cross, inner, alpha, beta  # type: ignore[return-value]

    def weights_of(self, block_index: int, skip: tuple[int, ...]) -> PromptWeights | bool:
        """What `forward` computes with; True where it is the identity, False where only calling it
        tells: the released prompts, dropout, a prompter left out, widths that change."""
        if type(self) is not SVPAdapter or is_hooked(self):
            return False
        if block_index not in self.layers:
            return True
        alpha, beta = self.alpha, self.beta
        dropping = self.training and self.dropout > 0
        if (
            self.released
            or dropping
            or not isinstance(alpha, Tensor)
            or not isinstance(beta, Tensor)
        ):
            return False
        if block_index == self._last:
            # the rows that the first block has taken are of no use to one who takes all at once
            self._alpha_rows.prepared = self._beta_rows.prepared = None
        place = self._places[block_index]
        cross: CrossPrompter = self.cross[place.group]  # type: ignore[assignment]
        inner: InnerPrompter = self.inner[block_index]  # type: ignore[assignment]
        down, up = inner.down, inner.up
        projections = (cross.weight, cross.bias, down.weight, down.bias, up.weight, up.bias)
        return PromptWeights(projections, alpha, place.alpha_row, beta, place.beta_row, skip)


def check_config_fits(config: SVPConfig, widths: Sequence[int]) -> None:
    """Raise `ConfigError` if `config` cannot prompt blocks of these widths."""
    depth = len(widths)
    if config.layers is not None and config.layers[-1] >= depth:
        raise ConfigError(
            f"layers={config.layers} names block {config.layers[-1]}, but the model has {depth} "
            f"blocks, 0..{depth - 1}. Choose indices below {depth}."
        )
    if config.cross_source != "released":
        return
    # RELEASED CODE: models_mamba.py:513 indexes a list of depth // group prompters, so another
    # depth raises IndexError there. Pinned by tests/test_prompters.py.
    if depth % config.cross_group_size:
        raise ConfigError(
            f"cross_source='released' with cross_group_size={config.cross_group_size} does not "
            f"fit {depth} blocks: the authors' code needs a depth divisible by the group size. "
            "Use a divisor of the depth, or cross_source='token', whose last group may be shorter."
        )
    if len(set(widths)) > 1:
        raise ConfigError(
            f"cross_source='released' does not fit blocks of several widths {sorted(set(widths))}: "
            "the authors' code knows plain Vision Mamba only. Use cross_source='token'."
        )


def simam(images: Tensor) -> Tensor:
    """Weigh every pixel by SimAM, a parameter-free attention on each channel of each image.

        d = (x - mean)^2,   out = x * sigmoid(d / (4 (sum(d) / n + 1e-3)) + 0.5),   n = H W - 1

    Args:
        images: float (batch, channels, ..., H, W); mean and sum run over H and W.

    Returns:
        Same shape and dtype as `images`; computed in float32 at least.

    Source: the option `input_relu` of the released SVP code, models_mamba.py lines 100-122.
    """
    x = images.to(torch.promote_types(images.dtype, torch.float32))
    n = x.shape[-1] * x.shape[-2] - 1
    squares = (x - x.mean(dim=(-2, -1), keepdim=True)).pow(2)
    variance = squares.sum(dim=(-2, -1), keepdim=True) / n
    weights = torch.sigmoid(squares / (4 * (variance + _SIMAM_LAMBDA)) + 0.5)
    return (x * weights).to(images.dtype)


def _places(widths: Sequence[int], cross_group_size: int) -> tuple[_Place, ...]:
    """Group and rows of every block; stages are runs of equal width, groups never leave a stage."""
    places: list[_Place] = []
    stage = beta_row = first_group = 0
    for index, width in enumerate(widths):
        if index and width != widths[index - 1]:
            stage, beta_row, first_group = stage + 1, 0, places[-1].group + 1
        alpha_row = beta_row // cross_group_size
        places.append(_Place(first_group + alpha_row, stage, alpha_row, beta_row))
        beta_row += 1
    return tuple(places)


def _zero_scales(shapes: Sequence[Sequence[int]]) -> nn.Parameter | nn.ParameterList:
    # zero scales make the patched model equal the base model before training
    scales = [nn.Parameter(torch.zeros(*shape)) for shape in shapes]
    return scales[0] if len(scales) == 1 else nn.ParameterList(scales)


def _row(
    scales: nn.Parameter | nn.ParameterList | None,
    stage: int,
    row: int,
    rows: _Rows,
    ends: tuple[bool, bool],
) -> Tensor | None:
    if scales is None:
        return None
    if isinstance(scales, nn.ParameterList):
        return scales[stage][row]
    if torch.compiler.is_compiling():
        return scales[row]
    return rows.take(scales, row, *ends)


class _Rows(Cache):
    """The rows of stacked scales, taken apart once per forward pass: one node of the graph.

    Taken one by one, the backward pass would fill a tensor with zeros for every row and add it up.
    The rows are held from the first prompted block to the last and no longer: they are part of the
    graph, and a graph that outlives its step breaks the capture of a CUDA graph.
    """

    def take(self, scales: Tensor, row: int, first: bool, last: bool) -> Tensor:
        state = (scales._version, torch.is_grad_enabled()) if not scales.is_inference() else ()
        if first:
            # in one assignment, because other threads may be in a pass of their own
            self.prepared = (scales, state, scales.unbind(0))
        held = self.prepared
        if last:
            self.prepared = None
        # blocks called alone or in another order (recomputation) find nothing, or another pass's
        if held is None or held[0] is not scales or held[1] != state:
            return scales[row]
        return held[2][row]  # type: ignore[no-any-return]
