"""How far training opened the prompts: the learned scales alpha and beta across depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from svp_peft.state import patched_model, svp_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ScaleProfile(NamedTuple):
    """Sizes of the active adapter's scales, each float32 (depth, 3) or None without prompters.

    The last axis is the 10%, 50% and 90% quantile of |scale| over the channels. Blocks of one
    cross group share their alpha, so its rows repeat; rows of blocks without prompts are zero.
    """

    alpha: Tensor | None
    beta: Tensor | None


@torch.no_grad()
def scale_profile(model: nn.Module) -> ScaleProfile:
    """Quantiles of |alpha| and |beta| of the active adapter, block by block.

    Raises:
        NotAppliedError: the model carries no SVP.
    """
    svp = svp_of(patched_model(model))
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    for index in range(svp.spec.depth):
        _, _, alpha, beta = svp.adapter.parts(index) if index in svp.adapter.layers else [None] * 4
        for scale, found in ((alpha, rows[0]), (beta, rows[1])):
            found.append(torch.zeros(3) if scale is None else _quantiles(scale))
    config = svp.adapter.config
    return ScaleProfile(
        torch.stack(rows[0]) if config.use_cross else None,
        torch.stack(rows[1]) if config.use_inner else None,
    )


def plot_scales(model: nn.Module) -> Figure:
    """Median and 10-90% range of |alpha| and |beta| over the channels, against the block index.

    Returns:
        A matplotlib figure. Raises as `scale_profile` does.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    profile = scale_profile(model)
    panels = (
        (profile.alpha, "alpha: cross prompts, shared by a group", "#0072b2"),
        (profile.beta, "beta: inner prompts", "#d55e00"),
    )
    shown = [panel for panel in panels if panel[0] is not None]
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axis, (values, title, colour) in zip(axes, shown, strict=True):
        assert values is not None
        low, median, high = values.T.tolist()
        blocks = range(len(median))
        axis.fill_between(blocks, low, high, color=colour, alpha=0.25, linewidth=0)
        axis.plot(blocks, median, color=colour, marker="o", markersize=4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("block")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("|scale| of the channels:\nmedian and 10-90%")
    return figure


def _quantiles(scale: Tensor) -> Tensor:
    levels = torch.tensor([0.1, 0.5, 0.9], device=scale.device)
    return torch.quantile(scale.abs().float(), levels).cpu()
