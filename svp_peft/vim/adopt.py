"""A VisionMamba over the parameters of a model that was built with a fork of mamba-ssm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from svp_peft.errors import CheckpointError, InputError
from svp_peft.vim.block import drop_path
from svp_peft.vim.geometry import arguments_of, complete_arguments

Model = TypeVar("Model", bound=nn.Module)

_FLAGS = (
    "final_pool_type",
    "fused_add_norm",
    "residual_in_fp32",
    "if_bidirectional",
    "if_rope_residual",
    "flip_img_sequences_ratio",
)
"""Constructor arguments that every fork keeps as attributes of the same name."""


_TOPS = frozenset(
    {
        "cls_token",
        "cls_token_head",
        "cls_token_tail",
        "head",
        "layers",
        "norm_f",
        "patch_embed",
        "pos_embed",
        "rope",
    }
)
"""Modules and parameters of a Vim itself that are in its state_dict."""


def adopt(build: Callable[..., Model], model: nn.Module, overrides: Mapping[str, Any]) -> Model:
    """`build(...)` for the geometry of `model`, holding model's own `Parameter` objects.

    Shapes come from the tensors and flags from the attributes of the model and of its mixers; the
    division by two from `if_divide_out` or `if_devide_out` (a fork that has neither does not
    divide). Stochastic depth and the training flag are taken over, and the head module is shared.

    Raises:
        InputError: the model is not a Vim, or does not say where its class token is.
    """
    unknown = sorted(overrides.keys() - arguments_of(build))
    if unknown:
        raise InputError(
            f"from_model does not know {unknown}: overrides are constructor arguments of "
            f"VisionMamba. Remove them."
        )
    _check_kind(model)
    kind = type(model).__name__
    # the head may be of any kind and is shared as a whole
    state = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and not name.startswith("head.")
    }
    try:
        arguments = complete_arguments(
            build, state, {**_flags_of(model), **overrides}, None, f"the {kind}"
        )
    except CheckpointError as error:
        raise InputError(str(error)) from error
    if arguments["if_cls_token"] and not arguments["use_double_cls_token"]:
        _check_position_is_known(model, overrides)
    arguments["num_classes"] = 0
    ours = build(**arguments, device="meta")
    own = ours.state_dict().keys()
    if own != state.keys():
        raise InputError(
            f"the {kind} is not a Vim: it lacks {sorted(own - state.keys())[:8]} and has "
            f"{sorted(state.keys() - own)[:8]} besides. Other families are adapted as they are: "
            f"svp_peft.apply_svp(model, config)."
        )
    for name, value in state.items():
        path, _, leaf = name.rpartition(".")
        owner = ours.get_submodule(path)
        registry: dict[str, Any] = (
            owner._parameters if leaf in owner._parameters else owner._buffers
        )
        registry[leaf] = value
    _share_head(ours, model)
    _copy_drop_rates(ours, model)
    return ours.train(model.training)


def _flags_of(model: nn.Module) -> dict[str, Any]:
    """Constructor arguments that tensors do not tell."""
    flags: dict[str, Any] = {name: getattr(model, name) for name in _FLAGS if hasattr(model, name)}
    flags["use_middle_cls_token"] = getattr(model, "use_middle_cls_token", True)
    mixer = getattr(_blocks(model)[0], "mixer", None)
    # forks before July 2024, and the released SVP code, have the old spelling
    flags["if_divide_out"] = bool(
        getattr(mixer, "if_divide_out", getattr(mixer, "if_devide_out", False))
    )
    embed = getattr(model, "patch_embed", None)
    if embed is not None:
        flags["img_size"] = getattr(embed, "img_size", None)
        flags["stride"] = getattr(getattr(embed, "proj", None), "stride", None)
    epsilon = getattr(getattr(model, "norm_f", None), "eps", None)
    if epsilon is not None:
        flags["norm_epsilon"] = epsilon
    return flags


def _check_kind(model: nn.Module) -> None:
    """Raise `InputError` for what is plainly no Vim, before its tensors are looked at."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise InputError(
            f"from_model takes a torch.nn.Module and got a {kind}. Pass the VisionMamba itself; a "
            "checkpoint is loaded with load_vim."
        )
    _blocks(model)
    tops = {name.split(".")[0] for name in model.state_dict()}
    if "svp" in tops:
        raise InputError(
            f"the {kind} carries SVP adapters, which from_model would leave behind. Save them and "
            "remove_svp(model) first, then load them into what from_model returns."
        )
    released = any(name.startswith("prompt_") for name in tops)
    if tops - _TOPS and not released:
        raise InputError(
            f"the {kind} is not a Vim: it has {sorted(tops - _TOPS)} besides. Other families are "
            "adapted as they are: svp_peft.apply_svp(model, config)."
        )


def _blocks(model: nn.Module) -> nn.ModuleList:
    # registered modules only: wrappers answer for what is inside them
    blocks = model._modules.get("layers")
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise InputError(
            f"the {type(model).__name__} is not a Vim: it has no ModuleList 'layers' with blocks. "
            "Pass the VisionMamba itself, without a wrapper around it."
        )
    return blocks


def _check_position_is_known(model: nn.Module, overrides: Mapping[str, Any]) -> None:
    # the released SVP code has no such flag and always puts the token in the middle
    known = hasattr(model, "use_middle_cls_token") or hasattr(model, "transfer_type")
    if not known and "use_middle_cls_token" not in overrides:
        raise InputError(
            f"the {type(model).__name__} has a class token and does not say where: it has no "
            f"attribute use_middle_cls_token. Pass use_middle_cls_token=True for a token in the "
            f"middle, False for one at the head (VideoMamba, and Vim before March 2024)."
        )


def _share_head(ours: Any, model: nn.Module) -> None:
    head = getattr(model, "head", None)
    if isinstance(head, nn.Module):
        ours.head = head
        linears = [module for module in head.modules() if isinstance(module, nn.Linear)]
        ours.num_classes = linears[-1].out_features if linears else 0


def _copy_drop_rates(ours: Any, model: Any) -> None:
    def rate(module: object) -> float:
        return float(getattr(getattr(module, "drop_path", None), "drop_prob", None) or 0.0)

    ours.drop_path = drop_path(rate(model))
    for block, theirs in zip(ours.layers, model.layers, strict=True):
        block.drop_path = drop_path(rate(theirs))
    if hasattr(ours, "pos_drop"):
        ours.pos_drop.p = getattr(getattr(model, "pos_drop", None), "p", 0.0)
