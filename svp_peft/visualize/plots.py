"""Gate maps and receptive fields as figures, laid over the image.

Colours are safe for colour-blind readers: cividis for amounts, PuOr around zero for changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from svp_peft.errors import InputError
from svp_peft.visualize.gates import DIRECTIONS, GateMaps
from svp_peft.visualize.receptive import ReceptiveField

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Quantity = Literal["update", "input", "forget"]

_AMOUNT = "cividis"
_CHANGE = "PuOr_r"
_NAMES = {"update": "update gate", "input": "input term", "forget": "forget gate"}
_SYMBOLS = {"update": r"$\Delta$", "input": r"$|\Delta B|$", "forget": r"$\exp(\Delta A)$"}
_PANEL = 1.9  # inches per panel with its colour bar
_IMAGE = 1.45  # inches of that for the image


def plot_gate_maps(
    maps: GateMaps,
    images: Tensor,
    *,
    index: int = 0,
    quantity: Quantity = "update",
    direction: int | None = None,
    opacity: float = 0.75,
) -> Figure:
    """One row per block: the image, a gate before and after prompting, its change, the prompts.

    Args:
        maps: from `gate_maps`.
        images: the batch that `maps` was made of, float (batch, channels, height, width); shown
            in grey, stretched to its own range, so that normalised images may be given.
        index: which image of the batch.
        quantity: which gate.
        direction: 0 forward, 1 backward; None: mean of the directions.
        opacity: of the maps over the image, 0..1.

    Returns:
        A matplotlib figure; call `.savefig(path)`. Before and after share one colour range in
        each row, and the change is symmetric around zero.

    Raises:
        InputError: no such image, quantity or direction.
    """
    from matplotlib.figure import Figure

    if quantity not in get_args(Quantity):
        raise InputError(
            f"quantity={quantity!r} is unknown: it says which gate to draw. "
            f"Use one of {list(get_args(Quantity))}."
        )
    _check_image(images, maps.cross.shape[1], index)
    before = _picked(getattr(maps.before, quantity), index, direction)
    after = _picked(getattr(maps.after, quantity), index, direction)
    columns = (
        f"{_NAMES[quantity]}\nbefore",
        f"{_NAMES[quantity]}\nafter",
        "change\nafter - before",
        "cross prompt\n" + r"$|\alpha\,G_C|$",
        "inner prompt\n" + r"$|\beta\,G_I|$",
    )
    rows = len(maps.blocks)
    figure = Figure(figsize=_size(rows, len(columns) + 1, images), layout="constrained")
    axes = figure.subplots(rows, len(columns) + 1, squeeze=False)
    for row, block in enumerate(maps.blocks):
        low = min(before[row].min().item(), after[row].min().item())
        high = max(before[row].max().item(), after[row].max().item())
        panels = (
            (before[row], _AMOUNT, low, high),
            (after[row], _AMOUNT, low, high),
            _around_zero(after[row] - before[row]),
            (maps.cross[row, index], _AMOUNT, 0.0, None),
            (maps.inner[row, index], _AMOUNT, 0.0, None),
        )
        _draw_image(axes[row, 0], images[index])
        axes[row, 0].set_ylabel(f"block {block}")
        for axis, panel in zip(axes[row, 1:], panels, strict=True):
            _overlay(figure, axis, images[index], *panel, opacity)
    axes[0, 0].set_title("image", fontsize=9)
    for axis, title in zip(axes[0, 1:], columns, strict=True):
        axis.set_title(title, fontsize=9)
    which = "mean of the directions" if direction is None else DIRECTIONS[direction]
    figure.suptitle(f"{_NAMES[quantity].capitalize()} {_SYMBOLS[quantity]}, {which}", fontsize=11)
    return figure


def plot_receptive_field(
    field: ReceptiveField, images: Tensor, *, index: int = 0, opacity: float = 0.75
) -> Figure:
    """The image, the share of each patch in the receptive field before and after, and its change.

    Args:
        field: from `receptive_field`.
        images: the batch that `field` was made of; shown as by `plot_gate_maps`.
        index: which image of the batch.
        opacity: of the maps over the image, 0..1.

    Returns:
        A matplotlib figure.

    Raises:
        InputError: no such image.
    """
    from matplotlib.figure import Figure

    _check_image(images, len(field.before), index)
    before, after = (maps[index] / maps[index].sum() for maps in (field.before, field.after))
    high = max(before.max().item(), after.max().item())
    figure = Figure(figsize=_size(1, 4, images), layout="constrained")
    axes = figure.subplots(1, 4)
    _draw_image(axes[0], images[index])
    _overlay(figure, axes[1], images[index], before, _AMOUNT, 0.0, high, opacity)
    _overlay(figure, axes[2], images[index], after, _AMOUNT, 0.0, high, opacity)
    _overlay(figure, axes[3], images[index], *_around_zero(after - before), opacity)
    for axis, title in zip(axes, ("image", "share before", "share after", "change"), strict=True):
        axis.set_title(title, fontsize=9)
    figure.suptitle("Effective receptive field of the class token", fontsize=11)
    return figure


def _check_image(images: Tensor, batch: int, index: int) -> None:
    if len(images) != batch:
        raise InputError(
            f"{len(images)} images were given for maps of {batch}: each map is drawn over its own "
            "image. Pass the batch that the maps were made of."
        )
    if not -batch <= index < batch:
        raise InputError(f"index={index} is not one of the {batch} images. Use 0..{batch - 1}.")


def _picked(gate: Tensor, index: int, direction: int | None) -> Tensor:
    """(blocks, rows, columns) of one image and one direction, or the directions' mean."""
    directions = gate.shape[1]
    if direction is None:
        return gate[:, :, index].mean(1)
    if direction not in range(directions):
        raise InputError(
            f"direction={direction!r} is not one of the {directions} scan directions. Use "
            f"{list(range(directions))}, {' and '.join(DIRECTIONS[:directions])}, or None for all."
        )
    return gate[:, direction, index]


def _around_zero(change: Tensor) -> tuple[Tensor, str, float, float]:
    reach = max(change.abs().max().item(), torch.finfo(torch.float32).tiny)
    return change, _CHANGE, -reach, reach


def _size(rows: int, columns: int, images: Tensor) -> tuple[float, float]:
    """Inches of a figure of panels, with room for titles above."""
    return columns * _PANEL, rows * (_IMAGE * images.shape[-2] / images.shape[-1] + 0.1) + 0.8


def _draw_image(axis: Axes, image: Tensor, *, faint: bool = False) -> None:
    grey = image.detach().float().mean(0).cpu()
    low, high = grey.min().item(), grey.max().item()
    # under a map, mid-greys only: black and white would change the colours of the map
    margin = 0.75 * (high - low) if faint else 0.0
    axis.imshow(
        grey.tolist(),
        cmap="gray",
        vmin=low - margin,
        vmax=high + margin,
        interpolation="nearest",
        extent=_extent(image),
    )
    axis.set_xticks([])
    axis.set_yticks([])


def _overlay(
    figure: Figure,
    axis: Axes,
    image: Tensor,
    values: Tensor,
    colours: str,
    low: float,
    high: float | None,
    opacity: float,
) -> None:
    _draw_image(axis, image, faint=True)
    drawn = axis.imshow(
        values.detach().float().cpu().tolist(),
        cmap=colours,
        vmin=low,
        vmax=high,
        alpha=opacity,
        interpolation="nearest",
        extent=_extent(image),
    )
    bar: Any = figure.colorbar(drawn, ax=axis, fraction=0.046, pad=0.02)
    bar.ax.tick_params(labelsize=6)
    bar.solids.set_alpha(1.0)
    bar.formatter.set_powerlimits((-2, 3))
    bar.ax.yaxis.get_offset_text().set_fontsize(6)


def _extent(image: Tensor) -> tuple[float, float, float, float]:
    """The image's own pixels: a map of patches is stretched over all of it."""
    return 0.0, float(image.shape[-1]), float(image.shape[-2]), 0.0
