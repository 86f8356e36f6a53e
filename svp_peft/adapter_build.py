"""From an adapter's contents to modules that fit a model, with every check on the way.

Nothing here changes the model: the modules are built beside it.
"""

import logging
import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from svp_peft.adapter_config import CONFIG_NAME, AdapterInfo
from svp_peft.adapter_format import UNUSED_SCALE_ROWS, AdapterContents, check_values
from svp_peft.adapter_tensors import PreparedAdapter, base_module, prepare_adapter
from svp_peft.backbones import BackboneSpec
from svp_peft.base_model import base_arch, base_fingerprint, differences
from svp_peft.errors import (
    AdapterConfigError,
    AdapterKeyError,
    AdapterShapeError,
    BaseModelMismatchError,
    ConfigError,
)
from svp_peft.heads import head_from_tensors
from svp_peft.patch import build_adapter
from svp_peft.prompters import SVPAdapter
from svp_peft.state import SVPState, module_path, plain_path, roles_of

logger = logging.getLogger(__name__)

CheckBaseModel = Literal["error", "warn", "ignore"]

Shapes = dict[str, tuple[int, ...]]


def check_contents(contents: AdapterContents) -> None:
    """Everything that can be known of an adapter without its model.

    Raises:
        AdapterConfigError, AdapterKeyError, AdapterShapeError, AdapterWeightsError: see
            `load_adapter`.
    """
    _check_shapes(contents, {**svp_shapes(contents), **head_shapes(contents)}, strict=True)
    check_values(contents)


def check_base(
    model: nn.Module, spec: BackboneSpec, contents: AdapterContents, check: CheckBaseModel
) -> None:
    """Raise or warn unless `model` is the base model the adapter was trained on."""
    info, parameters = contents.info, base_parameters(model)
    found = base_arch(parameters, spec.blocks, spec.widths, spec.class_tokens)
    wrong = differences(found, info.base_arch)
    named = info.svp.base_model_name_or_path
    hint = f"It was trained on {named}." if named else "The file does not name its base model."
    if wrong:
        raise BaseModelMismatchError(
            f"{contents.where} does not fit this model, which has {', '.join(wrong)}. {hint} "
            "Load the adapter into the base model it was trained on."
        )
    if check == "ignore" or info.base_fingerprint is None:
        return
    fingerprint = base_fingerprint(parameters, spec.blocks, info.svp.modules_to_save)
    if fingerprint == info.base_fingerprint:
        return
    message = (
        f"{contents.where} was trained on a base model with other weights (fingerprint "
        f"{info.base_fingerprint[:19]}, this model {fingerprint[:19]}). {hint} Its accuracy will "
        "suffer; load it into its own base, or pass check_base_model='ignore' if you know better."
    )
    if check == "error":
        raise BaseModelMismatchError(message)
    warnings.warn(message, stacklevel=3)


def prepare(
    model: nn.Module,
    spec: BackboneSpec,
    contents: AdapterContents,
    *,
    load_head: bool = True,
    strict: bool = True,
) -> PreparedAdapter:
    """The adapter with the file's values, for `install_adapter`; raises as `load_adapter`."""
    where, info = contents.where, contents.info
    if contents.from_weights_file:
        logger.warning(
            "%s: %s belongs to another save than the weights (one was interrupted, or two ran at "
            "once). The config inside the weights file is used.",
            where,
            CONFIG_NAME,
        )
    bases = {
        role: _base_module(model, spec, role)
        for role in roles_of(spec, info.svp)
        if role == "head" or _lookup(model, module_path(spec, role)) is not None
    }
    expected = svp_shapes(contents)
    # a head that is not loaded is the base model's
    filled = dict(bases["head"].state_dict(prefix="head.")) if not load_head and bases else {}
    for role, base in bases.items():
        if role == "head" and load_head:
            _check_head(base, contents, spec.widths[-1])
            expected |= head_shapes(contents) or _shapes(base.state_dict(prefix="head."))
        elif role != "head":
            expected |= _shapes(base.state_dict(prefix=f"{role}."))
    ignored = () if load_head else ("head.",)
    _check_shapes(contents, expected, strict=strict, ignored=ignored)
    check_values(contents, complete=strict)
    tensors = {key: t for key, t in contents.tensors.items() if key in expected} | filled
    try:
        if not strict:
            fresh = build_adapter(model, spec, info.svp).state_dict(prefix="svp.")
            for role, base in bases.items():
                fresh |= base.state_dict(prefix=f"{role}.")
            tensors = {key: fresh[key] for key in expected if key not in tensors} | tensors
        prepared = prepare_adapter(model, info.svp, tensors, backbone=spec)
    except ConfigError as error:
        raise AdapterConfigError(f"{where}: {error}") from error
    if not has_effect(tensors):
        warnings.warn(
            f"{where}: every learned scale is zero, so the prompts do nothing. The adapter was "
            "probably saved before it was trained.",
            stacklevel=3,
        )
    return prepared


def has_effect(tensors: Mapping[str, Tensor]) -> bool:
    """Whether any learned scale differs from zero."""
    return any(
        bool(tensor.any()) for key, tensor in tensors.items() if key.startswith(_SCALE_PREFIXES)
    )


def svp_shapes(contents: AdapterContents) -> Shapes:
    """Keys and shapes of the prompters and scales that the file's config asks for."""
    info = contents.info
    try:
        with torch.device("meta"):
            adapter = SVPAdapter(info.widths, info.depth, info.svp)
    except ConfigError as error:
        raise AdapterConfigError(f"{contents.where}/{CONFIG_NAME}: {error}") from error
    return _shapes(adapter.state_dict(prefix="svp."))


def head_shapes(contents: AdapterContents) -> Shapes:
    """Keys and shapes of the modules the file brings: they decide their own sizes."""
    roles = tuple(f"{role}." for role in contents.info.svp.modules_to_save)
    return _shapes({k: t for k, t in contents.tensors.items() if k.startswith(roles)})


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters without those of adapters, by the names they have unwrapped."""
    return {
        plain_path(name): tensor
        for name, tensor in model.named_parameters()
        if not name.startswith("svp.")
    }


_SCALE_PREFIXES = ("svp.alpha", "svp.beta")


def _check_head(base: nn.Module, contents: AdapterContents, d_model: int) -> None:
    where = contents.where
    head = {key: t for key, t in contents.tensors.items() if key.startswith("head.")}
    if head and isinstance(base, nn.Identity):
        raise BaseModelMismatchError(
            f"{where} brings a head ({_classes(contents.info)}), but this model has none "
            "(nn.Identity, num_classes=0), so its output would change from features to logits. "
            "Pass load_head=False to load the prompts alone, or give the model a head."
        )
    if not head and base.state_dict():
        raise AdapterKeyError(
            f"{where} has no tensors for the head, but this model has one: it was saved from a "
            "model without, or is incomplete. Pass load_head=False to keep the base model's head."
        )
    own = {key.removeprefix("head."): tensor for key, tensor in head.items()}
    try:
        head_from_tensors(base, own, d_model)
    except (AdapterKeyError, AdapterShapeError) as error:
        raise type(error)(f"{where}: {error}") from error


def _classes(info: AdapterInfo) -> str:
    return "of unknown size" if info.num_classes is None else f"for {info.num_classes} classes"


def _check_shapes(
    contents: AdapterContents, expected: Shapes, *, strict: bool, ignored: tuple[str, ...] = ()
) -> None:
    """Raise unless the file has just the expected keys, each with its shape."""
    where = contents.where
    found = {
        key: tuple(tensor.shape)
        for key, tensor in contents.tensors.items()
        if key != UNUSED_SCALE_ROWS and not key.startswith(ignored or "\0")
    }
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"lacks {len(missing)} of {len(expected)} tensors: {_some(missing)}")
        if extra:
            parts.append(f"holds {len(extra)} that this adapter does not have: {_some(extra)}")
        message = f"{where} {', and '.join(parts)}."
        if strict:
            raise AdapterKeyError(
                f"{message} It is incomplete, or belongs to another config or a deeper model. Save "
                "it again with save_adapter, or pass strict=False to load the rest."
            )
        warnings.warn(f"{message} Loaded all the same, because strict=False.", stacklevel=4)
    wrong = [
        f"{key} is {found[key]}, expected {expected[key]}"
        for key in sorted(expected.keys() & found.keys())
        if found[key] != expected[key]
    ]
    if wrong:
        more = f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise AdapterShapeError(
            f"{where}: {'; '.join(wrong[:6])}{more}. The file does not fit its config or this "
            "model: check inner_bottleneck and the base model, or save it again with save_adapter."
        )


def _base_module(model: nn.Module, spec: BackboneSpec, role: str) -> nn.Module:
    """The base model's own module, wherever it is now."""
    svp = model._modules.get("svp")
    if isinstance(svp, SVPState):
        return base_module(model, svp, role)
    return model.get_submodule(module_path(spec, role))


def _lookup(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def _some(keys: list[str], limit: int = 8) -> str:
    return f"{keys[:limit]}{f' and {len(keys) - limit} more' if len(keys) > limit else ''}"
