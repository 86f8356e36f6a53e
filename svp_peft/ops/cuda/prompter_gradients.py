"""Gradients of the prompters of a stack, gathered block by block in its backward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from svp_peft.ops.cuda.prompter_copies import Packed
from svp_peft.ops.cuda.stack_kernels import StackKernels
from svp_peft.ops.cuda.wide import wide_product
from svp_peft.ops.types import PromptWeights

# blocks whose partial sums are added up by one launch: at batch 96 those of a block take 2.4 MB
_SUMMED_AT_ONCE = 6


class PrompterGradients:
    """Filled from the last prompted block to the first, in float32.

    Symbols as in `svp_peft.ops.svp_prompt`; P is the number of prompted blocks.
    """

    def __init__(self, kernels: StackKernels, prompts: Sequence[PromptWeights]) -> None:
        self._kernels, self._prompts = kernels, prompts
        self._left = len(prompts)
        if not prompts:
            return
        width, row, device = kernels.width, kernels.row, kernels.device

        def floats(*sizes: int) -> Tensor:
            return torch.empty(len(prompts), *sizes, device=device, dtype=torch.float32)

        sizes = (min(_SUMMED_AT_ONCE, len(prompts)), kernels.partial_sums, 4, width)
        self._partial = torch.empty(sizes, device=device, dtype=torch.float32)
        self._sums = floats(4, width)  # of alpha, beta, b, d
        self._joint = floats(row, width)  # of [W | D]
        self._up = floats(width, row - width)

    def add(
        self,
        number: int,
        grad: Tensor,
        x: Tensor,
        joint: Tensor,
        inner: Tensor,
        packed: Packed,
    ) -> Tensor:
        """Take in block `number`; returns the gradient of [cross | middle], (tokens, row).

        Args:
            grad: of the prompted tokens, in x's dtype.
            x: tokens before the prompt.
            joint, inner: pre-activations, [cross | middle] and inner.
        """
        self._left -= 1
        at, width = self._left, self._kernels.width
        place = at % self._partial.shape[0]
        d_joint, d_inner = self._kernels.prompt_backward(
            number, grad, joint, inner, self._partial[place]
        )
        if place == 0:
            self._add_up(at)
        torch.mm(d_inner, packed.up, out=d_joint[:, width:])
        wide_product(d_joint.t(), x.view(-1, width), torch.float32, self._joint[at])
        wide_product(d_inner.t(), joint[:, width:], torch.float32, self._up[at])
        return d_joint

    def _add_up(self, first: int) -> None:
        """Sums of the blocks from `first` to the next whose partial sums were the first ones."""
        size = self._partial.shape[0]
        begin = first % size
        end = min(size, begin + len(self._prompts) - first)
        torch.sum(self._partial[begin:end], 1, out=self._sums[first : first + end - begin])

    def of(self, trained: Sequence[Tensor], need: Sequence[bool]) -> list[Tensor | None]:
        """The gradients of the trained tensors, those that are wanted."""
        if not trained:
            return []
        done, width = self._left, self._kernels.width
        if done % self._partial.shape[0]:
            self._add_up(done)  # a group that was not completed
        sums = self._sums[done:]
        found: dict[int, Tensor] = {}
        d_alpha: dict[int, Tensor] = {}
        d_beta: dict[int, Tensor] = {}
        prompts = self._prompts[done:]
        # the sum over the tokens of d_middle = d_inner U, by way of the one of d_inner
        ups = torch.stack([prompt.projections[4] for prompt in prompts])
        d_down_bias = torch.bmm(sums[:, 3:], ups).squeeze(1)
        # a copy: gradients outlive this object, and that of W need not stay with them
        d_down = self._joint[done:, width:].contiguous()
        for at, prompt in enumerate(prompts):
            _, _, down, down_bias, up, up_bias = prompt.projections
            _add(found, id(down), d_down[at])
            _add(found, id(down_bias), d_down_bias[at])
            _add(found, id(up), self._up[done + at])
            _add(found, id(up_bias), sums[at, 3])
            _add(d_beta, prompt.beta_row, sums[at, 1])
        for first, last in _runs([_group_of(prompt) for prompt in prompts]):
            cross, cross_bias = prompts[first].projections[:2]
            _add(found, id(cross), self._joint[done + first : done + last, :width].sum(0))
            of_group = sums[first:last, ::2].sum(0)
            _add(found, id(cross_bias), of_group[1])
            _add(d_alpha, prompts[first].alpha_row, of_group[0])
        _add(found, id(self._prompts[0].alpha), _stacked(d_alpha, self._prompts[0].alpha))
        _add(found, id(self._prompts[0].beta), _stacked(d_beta, self._prompts[0].beta))
        # a prompt whose gradients were not asked for has none
        return [
            found.get(id(t)) if wanted else None for t, wanted in zip(trained, need, strict=True)
        ]


def _group_of(prompt: PromptWeights) -> tuple[int, int, int]:
    """Equal for blocks that share all of a cross prompt, as those of a group do.

    Not for those with a parametrised cross prompter: they compute its weight each for itself.
    """
    cross, cross_bias = prompt.projections[:2]
    return id(cross), id(cross_bias), prompt.alpha_row


def _add(found: dict[int, Tensor], key: int, share: Tensor) -> None:
    """Add a share of a gradient, of which tensors that someone tied together have several."""
    found[key] = found[key] + share if key in found else share


def _runs(keys: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Where equal neighbours begin and end."""
    starts = [i for i, key in enumerate(keys) if i == 0 or key != keys[i - 1]]
    return list(zip(starts, [*starts[1:], len(keys)], strict=True))


def _stacked(rows: dict[int, Tensor], like: Tensor) -> Tensor:
    """The rows at their places, zeros elsewhere."""
    if len(rows) == like.shape[0]:
        return torch.stack([rows[i] for i in range(like.shape[0])])
    none = torch.zeros_like(like[0])
    return torch.stack([rows.get(i, none) for i in range(like.shape[0])])
