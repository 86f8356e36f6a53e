"""Ten ways to adapt a frozen Vision Mamba, put on a model in place by `apply_method`.

| method | trained, always with the classifier head |
|---|---|
| svp | cross and inner prompters: the paper's formula |
| svp-released | the same with the cross prompts of the released code |
| inner-only, cross-only | SVP with one path alone (the paper's ablation) |
| linear | nothing else |
| full | every parameter |
| bitfit | every bias |
| vpt-shallow | prompt tokens in front of the sequence (VPT, ECCV 2022) |
| vpt-deep | prompt tokens, new ones at every block |
| lora | low-rank updates of in_proj (peft), as in MambaPEFT |
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import svp_peft as sp

SVP_METHODS = ("svp", "svp-released", "inner-only", "cross-only")
METHODS = (
    *SVP_METHODS,
    *("linear", "full", "bitfit", "vpt-shallow", "vpt-deep", "lora"),
)


def apply_method(
    model: sp.VisionMamba,
    method: str,
    *,
    cross_group_size: int,
    inner_bottleneck: int = 64,
    simam_input: bool = False,
    factorised_head: bool = False,
    prompt_tokens: int = 16,
    lora_rank: int = 32,
) -> sp.VisionMamba:
    """Freeze `model`, add what `method` trains, and return it.

    The head must be the new task's already. The defaults of prompt_tokens and lora_rank are ours;
    32 gives LoRA on in_proj about the number of parameters of SVP.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown. Use one of {', '.join(METHODS)}.")
    if factorised_head:
        width, classes = model.head.in_features, model.head.out_features
        model.head = nn.Sequential(nn.Linear(width, width // 2), nn.Linear(width // 2, classes))
        for layer in model.head:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    if method in SVP_METHODS:
        return sp.apply_svp(
            model,
            sp.SVPConfig(
                inner_bottleneck=inner_bottleneck,
                cross_group_size=cross_group_size,
                simam_input=simam_input,
                cross_source="released" if method == "svp-released" else "token",
                use_cross=method != "inner-only",
                use_inner=method != "cross-only",
            ),
        )
    model.requires_grad_(method == "full")
    if method == "bitfit":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
    elif method in ("vpt-shallow", "vpt-deep"):
        add_prompt_tokens(model, prompt_tokens, deep=method == "vpt-deep")
    elif method == "lora":
        # peft takes seconds to import, and only this method needs it
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=["in_proj"])
        inject_adapter_in_model(config, model)
    model.head.requires_grad_(True)
    return model


# ---- visual prompt tuning ------------------------------------------------------------------------


class PromptTokens(nn.Module):
    """Learned tokens in front of the sequence: (depth, tokens, d_model), or depth 1 if shallow."""

    def __init__(self, depth: int, tokens: int, d_model: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(depth, tokens, d_model))
        nn.init.trunc_normal_(self.prompts, std=0.02)


class InsertTokens:
    """Forward pre-hook of block `index`: puts its prompt tokens in front.

    Block 0 makes the sequence longer. Later blocks, in the deep form, replace what the block
    before made of its prompt tokens; the residual there becomes zero, since a Vim block adds the
    residual to its input.
    """

    def __init__(self, owner: PromptTokens, index: int) -> None:
        self.owner, self.index = owner, index

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden, residual, *rest = args
        prompts = self.owner.prompts[self.index].to(hidden.dtype).expand(hidden.shape[0], -1, -1)
        count = prompts.shape[1]
        if self.index == 0:
            return (torch.cat((prompts, hidden), dim=1), residual, *rest), kwargs
        hidden = torch.cat((prompts, hidden[:, count:]), dim=1)
        nothing = torch.zeros_like(residual[:, :count])
        return (hidden, torch.cat((nothing, residual[:, count:]), dim=1), *rest), kwargs


class RemoveTokens:
    """Forward hook of the last block: takes the prompt tokens out again."""

    def __init__(self, owner: PromptTokens) -> None:
        self.owner = owner

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        count = self.owner.prompts.shape[1]
        return output[0][:, count:], output[1][:, count:]


def add_prompt_tokens(model: sp.VisionMamba, tokens: int, *, deep: bool) -> None:
    """VPT: `tokens` trained tokens before the first block, or before every one.

    Works with `VisionMamba`, whose blocks take and return (hidden_states, residual) and whose
    class token is found after the prompt tokens have left.
    """
    depth = len(model.layers) if deep else 1
    model.vpt = PromptTokens(depth, tokens, model.d_model)
    for index in range(depth):
        model.layers[index].register_forward_pre_hook(
            InsertTokens(model.vpt, index), with_kwargs=True
        )
    model.layers[-1].register_forward_hook(RemoveTokens(model.vpt))


# ---- what was trained, on disk -------------------------------------------------------------------


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that require a gradient, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_trained(model: nn.Module, method: str, folder: Path) -> None:
    """The adapter through `save_adapter`; of the other methods trained.safetensors.

    A crash leaves the old files or the new ones.
    """
    if method in SVP_METHODS:
        sp.save_adapter(model, folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "trained.safetensors.partial"
    state = {name: t.cpu().contiguous() for name, t in trained_state(model).items()}
    save_file(state, partial)
    os.replace(partial, folder / "trained.safetensors")


@torch.no_grad()
def load_trained(model: nn.Module, method: str, folder: Path) -> None:
    """Back into the model that `apply_method` made, in place."""
    if method in SVP_METHODS:
        sp.hotswap_adapter(model, folder)
        return
    parameters = dict(model.named_parameters())
    for name, tensor in load_file(folder / "trained.safetensors").items():
        parameters[name].copy_(tensor)
