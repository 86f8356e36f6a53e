"""Consecutive frozen blocks with their prompts, as one node of the autograd graph.

    x'       = prompt(x)                         where the block has one
    residual = residual + drop * x'
    x        = mixer(norm(residual))             block by block

What the host has to do for a block shrinks to the launches of its kernels, and what blocks have in
common is done at once: one launch converts all prompters' weights, one draws what is dropped, the
partial sums of scales and biases are added up for several blocks together, and a group's cross
prompter gets one gradient instead of one per block. The output is that of the blocks called one by
one, if the same images are dropped, but for the order in which the products of the prompts are
summed in float32, before they are rounded to the compute dtype.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svp_peft.ops.casting import without_autocast
from svp_peft.ops.cuda.frozen_mixer import FrozenMixer
from svp_peft.ops.cuda.prompter_copies import Copies, Packed
from svp_peft.ops.cuda.prompter_gradients import PrompterGradients
from svp_peft.ops.cuda.stack_kernels import StackKernels
from svp_peft.ops.derivatives import refuse_second
from svp_peft.ops.types import Cache, FrozenBlock, PromptWeights, StackKeep

# Whether the forward pass makes the inner prompt's second product where it is used, so that `inner`
# is in memory only where it is kept. Its float32 sums are added up in an order of their own.
FUSED_UP = True


class _Kept(NamedTuple):
    """What one block keeps."""

    x: Tensor | None
    total: Tensor
    normed: Tensor
    joint: Tensor | None
    inner: Tensor | None
    mixer: tuple[Tensor, ...]


def frozen_stack(
    hidden: Tensor,
    residual: Tensor,
    blocks: Sequence[FrozenBlock],
    mixers: Sequence[FrozenMixer],
    keep: StackKeep | None,
    cache: Cache,
) -> tuple[Tensor, Tensor]:
    """Run the blocks; returns the last mixer's output and the residual stream.

    Args:
        hidden: (batch, L, d_model) in the mixers' dtype, not empty.
        residual: (batch, L, d_model).
        blocks: all with one kind of norm, one eps, the same class tokens and prompters of the same
            sizes, whose weights are contiguous and in float32.
        mixers: the prepared mixer of each block.
        keep: None without gradients.
        cache: kept by the caller for this stack.
    """
    hidden, residual = _aligned(hidden), _aligned(residual)
    with without_autocast(hidden.device):
        stack = _Stack(hidden, residual, blocks, mixers, cache)
        if keep is None:
            return stack.forward(hidden, residual, None)[:2]
        return _Blocks.apply(hidden, residual, stack, keep, *stack.trained)  # type: ignore[no-any-return]


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


class _Blocks(torch.autograd.Function):
    """`_Stack.forward` and `.backward` in autograd's hands."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        residual: Tensor,
        stack: "_Stack",
        keep: StackKeep,
        *trained: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, total, kept = stack.forward(hidden, residual, keep)
        flat = [t for block in kept for t in (*block[:5], *block.mixer)]
        # the trained tensors, so that autograd notices when they change before the backward pass
        ctx.save_for_backward(*trained, stack.masks, *flat)
        ctx.stack, ctx.keep = stack, keep
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
    def backward(ctx: Any, d_hidden: Tensor | None, d_residual: Tensor | None) -> tuple[Any, ...]:
        refuse_second()
        stack, keep = ctx.stack, ctx.keep
        number = len(stack.trained)
        if d_hidden is None and d_residual is None:
            return (None,) * (4 + number)
        flat: list[Any] = list(ctx.saved_tensors[number + 1 :])
        size = len(flat) // (len(stack.blocks) - keep.first)
        kept = [
            _Kept._make([*flat[at : at + 5], tuple(flat[at + 5 : at + size])])
            for at in range(0, len(flat), size)
        ]
        needs = ctx.needs_input_grad
        with without_autocast(stack.kernels.device):
            d_hidden, d_residual, gradients = stack.backward(
                d_hidden, d_residual, kept, keep.first, needs[0] or needs[1], needs[4:]
            )
        return (
            d_hidden if needs[0] else None,
            d_residual if needs[1] else None,
            *(None, None),
            *gradients,
        )


class _Stack:
    """One forward pass over the blocks and its backward pass."""

    def __init__(
        self,
        hidden: Tensor,
        residual: Tensor,
        blocks: Sequence[FrozenBlock],
        mixers: Sequence[FrozenMixer],
        cache: Cache,
    ) -> None:
        self.blocks, self.mixers = blocks, mixers
        self.prompts: list[PromptWeights] = [b.prompt for b in blocks if b.prompt is not None]
        self.trained = _unique(self.prompts)
        self.kernels = StackKernels(hidden, residual, blocks)
        self._fused_up = FUSED_UP and self.kernels.has_prompt_up_norm
        prepared = _prepared(cache, blocks, self.prompts, hidden)
        copies = prepared.copies.renewed() if prepared.copies else []
        pending = iter(copies)
        self.packed = [None if b.prompt is None else next(pending) for b in blocks]
        self.masks: Tensor | None = None
        if prepared.stays is not None:
            # which images stay, of zeros and ones, (blocks, batch)
            self.masks = torch.bernoulli(prepared.stays.expand(-1, hidden.shape[0]))

    def _mask(self, number: int) -> tuple[int, float]:
        """Address of a block's mask, 0 where nothing is dropped; what is kept is scaled by."""
        rate = self.blocks[number].drop_rate
        if self.masks is None or rate == 0.0:
            return 0, 1.0
        at = self.masks.data_ptr() + 4 * number * self.masks.shape[1]
        # where everything is dropped there is nothing to scale up
        return at, 1.0 / (1.0 - rate) if rate < 1.0 else 1.0

    def forward(
        self, hidden: Tensor, residual: Tensor, keep: StackKeep | None
    ) -> tuple[Tensor, Tensor, list[_Kept]]:
        """(hidden, residual, what each block from `keep.first` on keeps)."""
        kept: list[_Kept] = []
        for number in range(len(self.blocks)):
            keeps = keep is not None and number >= keep.first
            x, packed, joint, inner = hidden, self.packed[number], None, None
            mask = self._mask(number)
            if packed is None:
                normed, residual = self.kernels.add_norm(number, x, residual, mask)
            else:
                keeps_prompt = keep is not None and keeps and keep.prompts
                joint = _cross_and_middle(x, packed, padded=not keeps_prompt)
                if self._fused_up:
                    normed, residual, inner = self.kernels.prompt_up_norm(
                        number, x, joint, packed, residual, mask, keeps_prompt
                    )
                else:
                    inner = _inner(joint, packed)
                    normed, residual = self.kernels.prompt_norm(
                        number, x, joint, inner, residual, mask
                    )
            level = keep.mixer if keep is not None and keeps else 0
            hidden, *from_mixer = self.mixers[number].forward(normed, level)
            if keep is not None and keeps:
                pre = (joint, inner) if keep.prompts else (None, None)
                given = None if packed is None else x
                kept.append(_Kept(given, residual, normed, *pre, tuple(from_mixer)))
        return hidden, residual, kept

    def backward(
        self,
        d_hidden: Tensor | None,
        d_residual: Tensor | None,
        kept: list[_Kept],
        first: int,
        need_input: bool,
        need: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """Gradients of hidden, residual and the trained tensors.

        Args:
            kept: of the blocks from `first` on.
            need_input: without it the first block's products for x are left out.
            need: which of the trained tensors' gradients are wanted.
        """
        if d_hidden is None:
            assert d_residual is not None
            d_hidden = torch.zeros_like(kept[-1].normed)
        if d_residual is not None:
            d_residual = _aligned(d_residual.to(self.kernels.residual_dtype))
        ours: Tensor | None = None  # every block but the last may write where it reads
        found = PrompterGradients(self.kernels, self.prompts)
        for number in reversed(range(first, len(self.blocks))):
            block = kept[number - first]
            d_normed = self.mixers[number].backward(d_hidden, block.normed, block.mixer)
            if ours is None:
                ours = torch.empty_like(block.total)
            d_x = self.kernels.add_norm_backward(
                number, d_normed, d_residual, block.total, self._mask(number), ours
            )
            d_residual = ours
            packed = self.packed[number]
            if packed is not None:
                assert block.x is not None
                joint, inner = block.joint, block.inner
                if joint is None or inner is None:
                    joint = _cross_and_middle(block.x, packed, padded=False)
                    inner = _inner(joint, packed)
                d_joint = found.add(number, d_x, block.x, joint, inner, packed)
                if need_input or number > first:
                    # into d_x, which is ours: another sum would begin with a copy of it
                    d_x.view(d_joint.shape[0], -1).addmm_(d_joint, packed.joint)
            d_hidden = d_x
        return d_hidden, d_residual, found.of(self.trained, need)


def _cross_and_middle(x: Tensor, packed: Packed, padded: bool) -> Tensor:
    """[cross | middle], (tokens, d_model + bottleneck), and zeros behind it where `padded`."""
    rows = x.view(-1, x.shape[-1])
    if padded:
        return torch.addmm(packed.padded_bias, rows, packed.padded.t())
    return torch.addmm(packed.joint_bias, rows, packed.joint.t())


def _inner(joint: Tensor, packed: Packed) -> Tensor:
    """(tokens, d_model)."""
    width, bottleneck = packed.up.shape
    middle = joint[:, width : width + bottleneck]
    return torch.addmm(packed.up_bias, middle, packed.up.t())


def _unique(prompts: Sequence[PromptWeights]) -> tuple[Tensor, ...]:
    """Every trained tensor once: the blocks of a group share their cross prompter."""
    tensors = (t for p in prompts for t in (*p.projections, p.alpha, p.beta))
    return tuple({id(t): t for t in tensors}.values())


class _Prepared:
    """What depends on the blocks alone and is kept from pass to pass."""

    def __init__(
        self,
        blocks: Sequence[FrozenBlock],
        prompts: Sequence[PromptWeights],
        like: Tensor,
        known: Sequence["_Prepared"],
    ) -> None:
        self.in_graph = False  # of launches, captured, which will use these buffers at any time
        self.rates = tuple(block.drop_rate for block in blocks)
        self.stays: Tensor | None = None
        if any(self.rates):
            stays = [[1.0 - rate] for rate in self.rates]
            self.stays = torch.tensor(stays, dtype=torch.float32).to(like.device)
        self.copies: Copies | None = None
        if prompts:
            # training and evaluation differ in what they drop and share the rest
            for other in known:
                if other._copies_are_for(prompts, like.dtype):
                    self.copies = other.copies
                    return
            projections = [[w.detach() for w in p.projections] for p in prompts]
            self.copies = Copies(projections, like.dtype)

    def is_for(
        self, blocks: Sequence[FrozenBlock], prompts: Sequence[PromptWeights], dtype: torch.dtype
    ) -> bool:
        if self.rates != tuple([block.drop_rate for block in blocks]):
            return False
        return self._copies_are_for(prompts, dtype)

    def _copies_are_for(self, prompts: Sequence[PromptWeights], dtype: torch.dtype) -> bool:
        if self.copies is None or not prompts:
            return self.copies is None and not prompts
        return self.copies.is_for([prompt.projections for prompt in prompts], dtype)


def _prepared(
    cache: Cache, blocks: Sequence[FrozenBlock], prompts: Sequence[PromptWeights], like: Tensor
) -> _Prepared:
    """From the cache, or made anew: training and evaluation drop and prompt differently."""
    known: list[_Prepared] = cache.prepared or []
    capturing = torch.cuda.is_current_stream_capturing()
    for prepared in known:
        if prepared.is_for(blocks, prompts, like.dtype):
            prepared.in_graph |= capturing
            return prepared
    # buffers made in inference mode could not be used for training
    with torch.inference_mode(False), torch.no_grad():
        prepared = _Prepared(blocks, prompts, like, known)
    # what is allocated under capture belongs to the graph's pool
    if not capturing:
        kept = [old for old in known[: 1 - _REMEMBERED] if old.in_graph]
        cache.prepared = [*kept, *known[1 - _REMEMBERED :], prepared]
    return prepared


_REMEMBERED = 4
