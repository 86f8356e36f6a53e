"""Maps of the gates of a Vim's mixers, before and after prompting.

The scan of one direction, channel d and state n is

    h_t = exp(delta_t,d A_d,n) h_{t-1} + delta_t,d B_t,n u_t,d

so delta is how much a token writes (the update gate), delta B how it enters the state, and
exp(delta A) how much of the past survives it (the forget gate). SVP was made to open these gates
on the tokens that matter (arXiv 2412.08947, section 3).

Shapes in this file.

batch    images
L        tokens, class tokens included
d_inner  channels inside the mixer
d_state  SSM states per channel
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp_peft.adapters import disable_adapter
from svp_peft.backbones import class_token_positions
from svp_peft.prompters import SVPAdapter
from svp_peft.state import SVPState, patched_model
from svp_peft.visualize.capture import (
    checked_blocks,
    checked_state,
    eager_evaluation,
    first_input,
    image_grid,
    patch_positions,
    vim_mixer,
)

DIRECTIONS = ("forward", "backward")
"""Names of the scan directions, in the order of the axis `directions`."""


class Gates(NamedTuple):
    """Gates of the chosen blocks, each float32 (blocks, directions, batch, rows, columns)."""

    update: Tensor
    """delta, averaged over the channels; positive."""
    input: Tensor
    """|delta B|, averaged over channels and states."""
    forget: Tensor
    """exp(delta A), averaged over channels and states; between 0 (all forgotten) and 1."""


class GateMaps(NamedTuple):
    """What `gate_maps` returns; maps are in image order, without class tokens."""

    blocks: tuple[int, ...]
    """Indices of the blocks along the first axis."""
    before: Gates
    """Of the base model, adapters disabled."""
    after: Gates
    """Of the model with its active adapter."""
    cross: Tensor
    """Length of the cross prompt, |alpha G_C(x_t)|, float32 (blocks, batch, rows, columns)."""
    inner: Tensor
    """Length of the inner prompt, |beta G_I(x_t)|, like `cross`."""

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches."""
        return self.cross.shape[-2], self.cross.shape[-1]


@torch.no_grad()
def gate_maps(model: nn.Module, images: Tensor, *, blocks: Sequence[int] | None = None) -> GateMaps:
    """Update, input and forget gates over the image, before and after prompting, and the prompts.

    Runs the model twice in evaluation mode, with the adapter disabled and enabled, and computes
    the gates of the chosen blocks from what enters their mixers. It does not matter which backend
    runs the model. The model's state, mode and gradients stay as they are.

    Args:
        model: patched by `apply_svp` or `load_adapter`: the built-in `VisionMamba`, also one made
            by `VisionMamba.from_model`, or any model with mixers of the same parts.
        images: float (batch, channels, height, width), as the model takes them.
        blocks: indices of the blocks, negative ones from the end; None: all.

    Returns:
        A `GateMaps`. Directions are (forward,) or (forward, backward), as the mixer scans. In
        blocks that see the tokens in reverse (`if_bidirectional`) the maps are turned back to
        image order while the directions stay the mixer's own. Blocks without a prompter have
        prompts of length zero.

    Raises:
        NotAppliedError: the model carries no SVP.
        InputError: no such blocks, no batch of images, or called inside `route` or
            `disable_adapter`.
        BackboneNotSupportedError: the blocks have no Vim mixer.

    Source: the gates are those of Mamba, arXiv 2312.00752, section 3.5.
    """
    model = patched_model(model)
    svp = checked_state(model, images, "gate_maps")
    chosen = checked_blocks(svp.spec, blocks)
    before: dict[int, Tensor] = {}
    after: dict[int, Tensor] = {}
    prompts: dict[int, Tensor] = {}
    with eager_evaluation(model):
        modules = {index: model.get_submodule(svp.spec.blocks[index]) for index in chosen}
        mixers = {index: vim_mixer(block) for index, block in modules.items()}
        with disable_adapter(model), _watched_mixers(svp, mixers, before):
            model(images)
        with _watched_mixers(svp, mixers, after), _watched_prompts(svp, modules, prompts):
            model(images)
        grid = image_grid(model, svp.spec, images, prompts[chosen[0]].shape[-1])

    def over_blocks(maps: dict[int, Tensor]) -> Tensor:
        """(quantities, blocks, ..., rows, columns)."""
        return torch.stack([maps[index] for index in chosen], dim=1).unflatten(-1, grid)

    cross, inner = over_blocks(prompts)
    return GateMaps(chosen, Gates(*over_blocks(before)), Gates(*over_blocks(after)), cross, inner)


def mixer_gates(mixer: Any, hidden: Tensor) -> Tensor:
    """Update, input and forget gate of every token.

    Args:
        mixer: a Vim mixer: one direction; a second one if it has `A_b_log`, with weights of its
            own if it has `x_proj_b`.
        hidden: what enters the mixer, float (batch, L, d_model).

    Returns:
        float32 or float64 (3, directions, batch, L), averaged as `Gates` says.
    """
    x = mixer.in_proj(hidden).chunk(2, dim=-1)[0]
    d_state = mixer.A_log.shape[1]
    compute = torch.promote_types(hidden.dtype, torch.float32)
    gates = []
    for backward in range(2 if hasattr(mixer, "A_b_log") else 1):
        own = "_b" if backward and hasattr(mixer, "x_proj_b") else ""
        # the forks' convolution looks at the tokens before t: turn them around for those after t
        u = (x.flip(1) if own else x).transpose(1, 2)
        u = F.silu(getattr(mixer, f"conv1d{own}")(u)[..., : x.shape[1]]).transpose(1, 2)
        low = getattr(mixer, f"x_proj{own}")(u.flip(1) if own else u)
        dt, B, _ = low.split((low.shape[-1] - 2 * d_state, d_state, d_state), dim=-1)
        delta = F.softplus(getattr(mixer, f"dt_proj{own}")(dt).to(compute))
        A = -torch.exp((mixer.A_b_log if backward else mixer.A_log).to(compute))
        update = delta.mean(-1)
        # delta > 0, so the mean of |delta B| over channels and states is a product of two means
        written = update * B.to(compute).abs().mean(-1)
        # image by image: all of exp(delta A) is d_inner * d_state numbers per token
        kept = torch.stack([torch.exp(one[..., None] * A).mean((-2, -1)) for one in delta])
        gates.append(torch.stack((update, written, kept)))
    return torch.stack(gates, dim=1)


def prompt_parts(
    adapter: SVPAdapter, x: Tensor, block_index: int, skip: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """What block `block_index` adds to its tokens: (alpha * G_C, beta * G_I), each like `x`.

    Both are zero at the class tokens `skip` and in blocks that have no such prompter.
    """
    parts = [torch.zeros_like(x), torch.zeros_like(x)]
    if block_index not in adapter.layers:
        return parts[0], parts[1]
    cross, inner, alpha, beta = adapter.parts(block_index)
    tokens = x.to(next(adapter.parameters()).dtype)
    source = tokens
    if adapter.released:
        # the second half takes its cross prompt from the first half once that is prompted
        first = adapter(tokens, block_index, skip)[:, : skip[0]]
        source = torch.cat((tokens[:, : skip[0] + 1], first), dim=1)
    if cross is not None and alpha is not None:
        parts[0] = alpha * cross(source)
    if inner is not None and beta is not None:
        parts[1] = beta * inner(tokens)
    for part in parts:
        part[:, list(skip)] = 0
    return parts[0], parts[1]


@contextmanager
def _watched_mixers(
    svp: SVPState, mixers: dict[int, nn.Module], seen: dict[int, Tensor]
) -> Iterator[None]:
    """Put `mixer_gates` of each block's patches into `seen`, float32 (3, directions, batch, M)."""

    def watch(index: int, mixer: nn.Module) -> Callable[[Tensor], None]:
        def see(hidden: Tensor) -> None:
            positions = patch_positions(svp.spec, index, hidden.shape[1])
            seen[index] = mixer_gates(mixer, hidden)[..., positions].float()

        return see

    with ExitStack() as stack:
        for index, mixer in mixers.items():
            stack.enter_context(first_input(mixer, "hidden_states", watch(index, mixer)))
        yield


@contextmanager
def _watched_prompts(
    svp: SVPState, blocks: dict[int, nn.Module], seen: dict[int, Tensor]
) -> Iterator[None]:
    """Put the lengths of both prompts of each block into `seen`, float32 (2, batch, M)."""

    def watch(index: int) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            turned = index in svp.spec.reversed_blocks
            skip = class_token_positions(svp.spec.class_tokens, x.shape[1], turned)
            lengths = torch.stack(prompt_parts(svp.adapter, x, index, skip)).norm(dim=-1)
            seen[index] = lengths[..., patch_positions(svp.spec, index, x.shape[1])].float()

        return see

    with ExitStack() as stack:
        for index, block in blocks.items():
            # before the prompts' own hook, which replaces this input
            stack.enter_context(first_input(block, svp.spec.input_name, watch(index), first=True))
        yield
