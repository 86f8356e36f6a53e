"""Classifier heads: one of another number of classes, and the released code's two-layer head."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from svp_peft.errors import AdapterKeyError, AdapterShapeError, InputError


def head_for(base: nn.Module, num_classes: int, d_model: int) -> nn.Module:
    """A fresh head like `base` with `num_classes` outputs, on its device and of its dtype.

    Weights are drawn from a normal distribution of standard deviation 0.02, truncated at +-2, and
    biases are zero, as in Vim.

    Args:
        base: the model's own head: nn.Linear, nn.Sequential that ends with one, or nn.Identity.
        d_model: inputs of the head where `base` is nn.Identity.

    Raises:
        InputError: `base` is of another kind, or `num_classes` is no positive integer.
    """
    if not isinstance(num_classes, int) or isinstance(num_classes, bool) or num_classes < 1:
        raise InputError(
            f"num_classes={num_classes!r} must be an integer of at least 1: it is the number of "
            "outputs of the head. Pass the number of classes of the task."
        )
    if isinstance(base, nn.Identity):
        return _fresh_linear(d_model, num_classes, True, None)
    if isinstance(base, nn.Linear):
        return _fresh_linear(base.in_features, num_classes, base.bias is not None, base.weight)
    if isinstance(base, nn.Sequential) and len(base) and isinstance(base[-1], nn.Linear):
        head = copy.deepcopy(base)
        last = base[-1]
        head[-1] = _fresh_linear(last.in_features, num_classes, last.bias is not None, last.weight)
        return head
    raise InputError(
        f"the model's head is a {type(base).__name__}, of which svp_peft cannot make one with "
        f"{num_classes} classes: it knows nn.Linear, nn.Identity and nn.Sequential ending with "
        "nn.Linear. Pass your own head=nn.Module."
    )


def two_layer_head(d_model: int, num_classes: int) -> nn.Sequential:
    """Linear(d_model, d_model // 2), Linear(d_model // 2, num_classes), nothing in between.

    The released code uses it for CUB-200, NABirds and Flowers.

    Source: models_mamba.py lines 233-239 of AAAI2025-SVP at 5ea376c.
    """
    return nn.Sequential(
        _fresh_linear(d_model, d_model // 2, True, None),
        _fresh_linear(d_model // 2, num_classes, True, None),
    )


def head_from_tensors(base: nn.Module, tensors: Mapping[str, Tensor], d_model: int) -> nn.Module:
    """A head of the kind and size that `tensors` belong to, uninitialised.

    Args:
        base: the model's own head, which decides if it has the same keys as `tensors`.
        tensors: state_dict of the wanted head.
        d_model: inputs of the head where `base` is nn.Identity.

    Raises:
        AdapterKeyError: the tensors are of no kind of head that is known.
        AdapterShapeError: they are of a head with another number of inputs.
    """
    keys = set(tensors)
    weight = tensors.get("weight")
    _check_inputs(base, tensors, d_model)
    with torch.device("meta"):
        if keys in ({"weight"}, {"weight", "bias"}) and weight is not None and weight.dim() == 2:
            return nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in keys)
        two_layers = {"0.weight", "0.bias", "1.weight", "1.bias"}
        if keys == two_layers and all(tensors[f"{i}.weight"].dim() == 2 for i in (0, 1)):
            first, second = tensors["0.weight"], tensors["1.weight"]
            return nn.Sequential(
                nn.Linear(first.shape[1], first.shape[0]),
                nn.Linear(second.shape[1], second.shape[0]),
            )
    if not keys and not base.state_dict():
        return copy.deepcopy(base)
    if keys == set(base.state_dict()):
        head = copy.deepcopy(base)
        last = f"{len(head) - 1}.weight" if isinstance(head, nn.Sequential) else ""
        if last in keys and isinstance(head, nn.Sequential) and isinstance(head[-1], nn.Linear):
            bias = head[-1].bias is not None
            head[-1] = nn.Linear(head[-1].in_features, tensors[last].shape[0], bias=bias)
        return head
    raise AdapterKeyError(
        f"the head's tensors are {sorted(keys)[:6]}, but the model's head is a "
        f"{type(base).__name__} with {sorted(base.state_dict())[:6]}: this is no linear head, no "
        "two-layer head and not the model's own kind. Give the model a head of the adapter's kind "
        "first, or load without the head."
    )


def _check_inputs(base: nn.Module, tensors: Mapping[str, Tensor], d_model: int) -> None:
    linears = [m.in_features for m in base.modules() if isinstance(m, nn.Linear)]
    inputs = linears[0] if linears else d_model
    first = tensors.get("weight", tensors.get("0.weight"))
    if first is not None and first.dim() == 2 and first.shape[1] != inputs:
        raise AdapterShapeError(
            f"the head's first weight has shape {tuple(first.shape)}, but the model gives its head "
            f"{inputs} features: the adapter was made for another model. Load it into its own "
            "base, or load without the head."
        )


def _fresh_linear(inputs: int, outputs: int, bias: bool, like: Tensor | None) -> nn.Linear:
    device = None if like is None else like.device
    dtype = None if like is None or not like.is_floating_point() else like.dtype
    linear = nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear
