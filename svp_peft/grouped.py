"""The prompts of several adapters on one batch, in batched products instead of one after the other.

On a GPU eight adapters on eight images each would be eight times as many kernels, each too small
to fill it. Here images are laid out as (adapters, images, L, d_model), padded to the largest group,
and every product is one batched product: as many launches for eight adapters as for two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp_peft.ops.backends import choose, kernels
from svp_peft.ops.casting import compute_dtype
from svp_peft.ops.reference import positions_mask
from svp_peft.prompters import SVPAdapter

# padded images per image above which one product per adapter does less work. The prompts are about
# a tenth of a block's work, so that padding costs a tenth at most
_MOST_PADDING = 2.0

# elements of the weights that are laid out at once; a model of more is done in runs of blocks
_MOST_WEIGHTS = 40_000_000


class _Weights(NamedTuple):
    """One block's prompters, one after the other by adapter, in the dtype of the products."""

    joint: Tensor
    """[W | D], (adapters, d_model + bottleneck, d_model)."""
    joint_bias: Tensor
    """[b | c], (adapters, 1, d_model + bottleneck)."""
    up: Tensor
    """U, (adapters, d_model, bottleneck)."""
    up_bias: Tensor
    """d, (adapters, 1, d_model)."""
    alpha: Tensor
    """(adapters, 1, d_model), in the dtype of the parameters; so is beta."""
    beta: Tensor


class _Places(NamedTuple):
    """How rows stand when sorted by adapter and padded to as many for each."""

    there: Tensor | None
    """Row of each place, or None: the places are the rows as they are."""
    back: Tensor
    """Place of each row; those beyond the last place have no prompt, and stand there in order."""
    most: int
    """Places of an adapter."""


class _Run(NamedTuple):
    """The weights of some blocks in a row, as they were when the first of them was called."""

    key: tuple[object, ...]
    block: int
    """That has been called last."""
    weights: dict[int, _Weights]


class GroupedPrompts:
    """Prompts a batch whose rows belong to several adapters.

    Args:
        groups: rows of each adapter, by name. Rows that are in none stay as they are.
        rows: in the whole batch.
    """

    def __init__(self, groups: Mapping[str, Sequence[int]], rows: int) -> None:
        self.groups, self.rows = dict(groups), rows
        self._places: dict[tuple[object, ...], _Places] = {}
        self._masks: dict[tuple[object, ...], Tensor] = {}
        self._runs: dict[tuple[object, ...], dict[int, range]] = {}
        self._run: _Run | None = None

    def forget(self) -> None:
        """Let go of what is known of adapters, and of weights of a pass that ended early."""
        self._runs, self._run = {}, None

    def prompting(self, adapters: Mapping[str, SVPAdapter], block: int) -> tuple[str, ...] | None:
        """Names of the adapters that prompt this block; None where they are not to be grouped."""
        found = tuple(name for name in self.groups if block in adapters[name].layers)
        if len(found) < 2 or not _are_alike([adapters[name] for name in found], block):
            return None
        sizes = [len(self.groups[name]) for name in found]
        return found if max(sizes) * len(sizes) <= _MOST_PADDING * sum(sizes) else None

    def __call__(
        self,
        x: Tensor,
        adapters: Mapping[str, SVPAdapter],
        names: tuple[str, ...],
        block: int,
        skip: Sequence[int],
    ) -> Tensor:
        """Each row prompted by its own adapter; the formula is that of prompters.py.

        Args:
            x: tokens entering a block, float (rows, L, d_model), or several rows of tokens for
                each of the rows in a row (windows).
            names: what `prompting` gave for this block.
            skip: positions of the class tokens, sorted, each in 0..L-1.

        Returns:
            Prompted tokens, of the shape and dtype of `x`; rows without a prompt bit for bit.
        """
        length, width = x.shape[1:]
        places = self._places_of(names, x.shape[0] // self.rows, x.device)
        sorted_rows = x if places.there is None else x.index_select(0, places.there)
        tokens = sorted_rows.reshape(len(names), places.most * length, width)
        if torch.is_autocast_enabled(x.device.type):
            dtype = compute_dtype(x)
        else:
            weight = _down(adapters[names[0]], block).weight
            dtype = torch.promote_types(x.dtype, weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            weights = self._weights(adapters, names, block, dtype)
            joint = torch.baddbmm(
                weights.joint_bias, tokens.to(dtype), weights.joint.transpose(1, 2)
            )
            cross, middle = joint[..., :width], joint[..., width:]
            inner = torch.baddbmm(weights.up_bias, middle, weights.up.transpose(1, 2))
            if _has_kernel(x):
                shape = (len(names), places.most, length)
                return kernels("cuda").prompt_rows(  # type: ignore[no-any-return]
                    x, cross.unflatten(1, shape[1:]), inner.unflatten(1, shape[1:]),
                    weights.alpha[:, 0], weights.beta[:, 0], places.back, skip,
                )  # fmt: skip
            mask = self._mask(length, places.most, skip, x.device)
            prompted = _added(tokens, cross, inner, weights, mask).view(sorted_rows.shape)
            if places.there is None:
                return prompted
            if sum(len(self.groups[name]) for name in names) < self.rows:
                prompted = torch.cat((prompted, x))
            return prompted.index_select(0, places.back)

    def _places_of(self, names: tuple[str, ...], repeat: int, device: torch.device) -> _Places:
        key = (names, repeat, device)
        known = self._places.get(key)
        if known is not None:
            return known
        most = repeat * max(len(self.groups[name]) for name in names)
        there: list[int] = []
        back = [-1] * (self.rows * repeat)
        for name in names:
            own = [row * repeat + k for row in self.groups[name] for k in range(repeat)]
            for place, row in enumerate(own, len(there)):
                back[row] = place
            there += own + own[:1] * (most - len(own))
        # rows without a prompt come from behind the prompted ones
        back = [row + len(there) if at < 0 else at for row, at in enumerate(back)]

        # tensors made in inference mode could not be used for training
        with torch.inference_mode(False):
            as_they_are = there == list(range(self.rows * repeat))
            index = None if as_they_are else torch.tensor(there, device=device)
            places = _Places(index, torch.tensor(back, device=device), most)
        self._places[key] = places
        return places

    def _mask(
        self, length: int, rows: int, skip: Sequence[int], device: torch.device
    ) -> Tensor | None:
        """bool (rows * L, 1): True at class tokens; None where there are none."""
        if not skip:
            return None
        key = (length, rows, tuple(skip), device)
        mask = self._masks.get(key)
        if mask is None:
            with torch.inference_mode(False):
                mask = positions_mask(length, skip, device).repeat(rows)[:, None]
            # what is made while a CUDA graph is captured holds nothing until it is replayed
            if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
                self._masks[key] = mask
        return mask

    def _weights(
        self,
        adapters: Mapping[str, SVPAdapter],
        names: tuple[str, ...],
        block: int,
        dtype: torch.dtype,
    ) -> _Weights:
        """The weights of one block, laid out anew in every pass.

        Weights may change behind the back of their version counters (in a captured graph, through
        `.data`), and copying them costs less than finding out. Where no gradient is wanted, those
        of a whole run of blocks are copied at its first block, in as many launches as those of
        one. In training every block copies its own: a stack that all blocks share would give every
        weight a gradient, used or not.
        """
        own = [adapters[name] for name in names]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return _laid_out(own, [block], dtype)[block]
        blocks = self._blocks_of(adapters, names, block)
        key = (names, tuple(map(id, own)), blocks, dtype)
        run = self._run
        if block == blocks[0]:
            run = _Run(key, block, _laid_out(own, blocks, dtype))
        # blocks called alone or in another order find nothing, or another pass's
        elif run is None or run.key != key or run.block != block - 1:
            return _laid_out(own, [block], dtype)[block]
        # in one assignment, because other threads may be in a pass of their own
        self._run = None if block == blocks[-1] else run._replace(block=block)
        return run.weights[block]

    def _blocks_of(
        self, adapters: Mapping[str, SVPAdapter], names: tuple[str, ...], block: int
    ) -> range:
        """The run that a block is in: all of it prompted by these adapters and equally wide."""
        own = [adapters[name] for name in names]
        key = (names, tuple(map(id, own)))
        runs = self._runs.get(key)
        if runs is None:
            rest = [adapters[name] for name in self.groups if name not in names]
            runs = self._runs[key] = _runs(own, rest)
        return runs[block]


def _runs(adapters: Sequence[SVPAdapter], rest: Sequence[SVPAdapter]) -> dict[int, range]:
    """For each block that these adapters prompt and the rest do not, the run that it is in."""
    found: dict[int, range] = {}
    blocks: list[int] = []
    shared = frozenset.intersection(*(adapter.layers for adapter in adapters))
    shared = shared.difference(*(adapter.layers for adapter in rest))
    widths = {block: _down(adapters[0], block).in_features for block in shared}
    for block in sorted(shared):
        size = len(adapters) * _weights_of_block(adapters[0], block)
        full = (len(blocks) + 1) * size > _MOST_WEIGHTS
        if blocks and (full or blocks[-1] != block - 1 or widths[blocks[-1]] != widths[block]):
            blocks = []
        blocks.append(block)
        found |= dict.fromkeys(blocks, range(blocks[0], block + 1))
    return found


def _down(adapter: SVPAdapter, block: int) -> nn.Linear:
    return adapter.inner[block].down  # type: ignore[return-value]


def _weights_of_block(adapter: SVPAdapter, block: int) -> int:
    down = _down(adapter, block)
    return down.in_features * (down.in_features + 2 * down.out_features)


def _laid_out(
    adapters: Sequence[SVPAdapter], blocks: Sequence[int], dtype: torch.dtype
) -> dict[int, _Weights]:
    """The weights of blocks that are equally wide, in `dtype`: six copies for all of them."""
    joint: list[Tensor] = []
    joint_bias: list[Tensor] = []
    up: list[Tensor] = []
    up_bias: list[Tensor] = []
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for block in blocks:
        for adapter in adapters:
            cross, inner, alpha, beta = adapter.parts(block)
            assert cross is not None
            assert inner is not None
            assert alpha is not None
            assert beta is not None
            joint += [cross.weight, inner.down.weight]
            joint_bias += [cross.bias, inner.down.bias]
            up.append(inner.up.weight)
            up_bias.append(inner.up.bias)
            alphas.append(alpha)
            betas.append(beta)
    shape = (len(blocks), len(adapters), -1)
    width = len(alphas[0])
    copies = (
        torch.cat(joint).view(*shape, width).to(dtype),
        torch.cat(joint_bias).view(*shape).unsqueeze(2).to(dtype),
        torch.cat(up).view(len(blocks), len(adapters), width, -1).to(dtype),
        torch.cat(up_bias).view(*shape).unsqueeze(2).to(dtype),
        torch.cat(alphas).view(*shape).unsqueeze(2),
        torch.cat(betas).view(*shape).unsqueeze(2),
    )
    each = zip(*(copy.unbind(0) for copy in copies), strict=True)
    return {block: _Weights(*weights) for block, weights in zip(blocks, each, strict=True)}


def _has_kernel(x: Tensor) -> bool:
    """Whether all that follows the products is one kernel: it has no derivative."""
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if plain or torch._C._are_functorch_transforms_active() or x.dtype == torch.float64:
        return False
    return choose(None, x.device, x.dtype) == "cuda"


def _added(
    tokens: Tensor, cross: Tensor, inner: Tensor, weights: _Weights, mask: Tensor | None
) -> Tensor:
    """(adapters, images * L, d_model), each with its own adapter's prompts."""
    compute = torch.promote_types(tokens.dtype, torch.float32)
    added = F.silu(inner.to(compute)) * weights.beta
    added = torch.addcmul(added, F.silu(cross.to(compute)), weights.alpha)
    if mask is not None:
        added = added.masked_fill(mask, 0.0)
    return (tokens + added).to(tokens.dtype)


def _are_alike(adapters: Sequence[SVPAdapter], block: int) -> bool:
    """Whether nothing but the values of their weights tells one block's prompts apart."""
    if not all(
        adapter.config.use_cross
        and adapter.config.use_inner
        and not adapter.released
        and not (adapter.training and adapter.dropout > 0)
        for adapter in adapters
    ):
        return False
    weights = [_down(adapter, block).weight for adapter in adapters]
    return len({(weight.shape, weight.dtype) for weight in weights}) == 1
