"""Adapters as named tensors: read them, build one from them beside a model, install it at once.

`prepare_adapter` does everything that can fail, without touching the model; `install_adapter` then
only puts finished parts into place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from svp_peft.backbones import BackboneSpec
from svp_peft.config import BASE_ADAPTER, SVPConfig, check_adapter_name
from svp_peft.errors import AdapterKeyError, AdapterNameError, AdapterShapeError, InputError
from svp_peft.heads import head_from_tensors
from svp_peft.patch import attach, build_adapter, check_patchable
from svp_peft.prompters import SVPAdapter
from svp_peft.sharded import copy_values
from svp_peft.state import (
    SVPState,
    add_parts,
    are_alike,
    copy_tensors,
    module_path,
    patched_model,
    roles_of,
    set_module,
    svp_of,
    use_modules_of,
)


class PreparedAdapter(NamedTuple):
    """An adapter that is known to fit a model and not yet part of it."""

    spec: BackboneSpec
    adapter: SVPAdapter
    modules: dict[str, nn.Module]


def adapter_state(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """All tensors of an adapter under the keys of its file, sharing memory with the model.

    Keys are `svp.inner.{l}.down|up.{weight,bias}`, `svp.cross.{g}.{weight,bias}`, `svp.alpha`,
    `svp.beta`, `head.*`, and `{path}.*` for every other entry of `modules_to_save`.

    Args:
        name: None takes the active adapter.
    """
    model = patched_model(model)
    svp = svp_of(model)
    name = svp.active if name is None else name
    state = {f"svp.{key}": t for key, t in svp.require(name).state_dict().items()}
    for role, module in adapter_modules(model, name).items():
        state |= {f"{role}.{key}": tensor for key, tensor in module.state_dict().items()}
    return state


def adapter_modules(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The adapter's own copies of the modules in `modules_to_save`, by entry."""
    model = patched_model(model)
    svp = svp_of(model)
    return {
        role: module_of(model, svp, name, role)
        for role in roles_of(svp.spec, svp.require(name).config)
    }


def prepare_adapter(
    model: nn.Module,
    config: SVPConfig,
    tensors: Mapping[str, Tensor],
    *,
    backbone: BackboneSpec | None = None,
) -> PreparedAdapter:
    """Build an adapter from the tensors of `adapter_state`, beside the model and not in it.

    The model may carry SVP already or not. The adapter is on the model's device; prompters are
    float32 (float64 in a float64 model), other modules have the dtype of the base model's.

    Raises:
        AdapterKeyError: tensors are missing, or there are some the adapter does not have.
        AdapterShapeError: a tensor has another shape than the model asks for.
        ConfigError, BackboneNotSupportedError: as `apply_svp`.
    """
    if any(isinstance(module, SVPState) for module in model.modules()):
        model = patched_model(model)
        spec, svp = svp_of(model).spec, svp_of(model)
    else:
        spec, svp = check_patchable(model, backbone), None
    adapter = build_adapter(model, spec, config, empty=True)
    modules: dict[str, nn.Module] = {}
    for role in roles_of(spec, config):
        base = model.get_submodule(module_path(spec, role))
        if svp is not None:
            base = base_module(model, svp, role)
        own = {
            k.removeprefix(f"{role}."): t for k, t in tensors.items() if k.startswith(f"{role}.")
        }
        if role == "head":
            modules[role] = head_from_tensors(base, own, spec.widths[-1])
        else:
            modules[role] = copy.deepcopy(base)
        like = next(base.parameters(), next(adapter.parameters()))
        modules[role] = modules[role].to_empty(device=like.device).to(dtype=like.dtype)
        modules[role].train(model.training)
    expected = {f"svp.{key}": t for key, t in adapter.state_dict().items()}
    for role, module in modules.items():
        expected |= {f"{role}.{key}": t for key, t in module.state_dict().items()}
    _check_tensors(expected, tensors)
    with torch.no_grad():
        for key, tensor in expected.items():
            copy_values(tensor, tensors[key])
    return PreparedAdapter(spec, adapter, modules)


def install_adapter(
    model: nn.Module,
    name: str,
    prepared: PreparedAdapter,
    *,
    activate: bool = True,
    trainable: bool = True,
    overwrite: bool = False,
) -> None:
    """Add a prepared adapter to its model, patching the model if it was not; all or nothing.

    Args:
        activate: make it the active adapter.
        trainable: requires_grad of the adapter and its modules.
        overwrite: replace an adapter of the same name.

    Raises:
        AdapterNameError: the name is malformed or reserved, or taken and not to be overwritten.
    """
    check_adapter_name(name)
    if not any(isinstance(module, SVPState) for module in model.modules()):
        svp = attach(model, prepared.spec, name, prepared.adapter, prepared.modules)
        set_trainable(model, svp, name, trainable)
        return
    model = patched_model(model)
    svp = svp_of(model)
    refuse_while_routing(svp, "install_adapter")
    if name in svp.adapters:
        if not overwrite:
            check_new_name(svp, name)
        use_modules_of(model, BASE_ADAPTER)
        give_originals_back(model, svp, name)
    add_parts(model, name, prepared.adapter, prepared.modules)
    set_trainable(model, svp, name, trainable)
    if activate:
        svp.active = name
    use_modules_of(model, svp.effective)


def copy_into_adapter(model: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite the values of an adapter in place: same tensors, same addresses, new numbers.

    A compiled graph, a captured CUDA graph or an optimizer that holds the tensors sees the new
    values at once.

    Raises:
        AdapterKeyError, AdapterShapeError: `tensors` are not those of `adapter_state`; the model
            is unchanged.
    """
    current = adapter_state(model, name)
    _check_tensors(current, tensors)
    with torch.no_grad():
        for key, tensor in current.items():
            copy_values(tensor, tensors[key])


def check_new_name(svp: SVPState, name: str) -> None:
    """Raise `AdapterNameError` unless `name` can name a new adapter."""
    check_adapter_name(name)
    if name in svp.adapters:
        raise AdapterNameError(
            f"there is already an adapter {name!r} in this model: it would be lost. Choose another "
            "name, or delete_adapter it first."
        )


def refuse_while_routing(svp: SVPState, action: str) -> None:
    """Raise `InputError` inside `route`."""
    if svp.routing is not None:
        raise InputError(
            f"{action} was called inside route(...), where every image has its own adapter. "
            "Leave the context first."
        )


def module_of(model: nn.Module, svp: SVPState, name: str, role: str) -> nn.Module:
    """Adapter `name`'s version of a module, in use or parked."""
    if svp.in_use.get(role) == name:
        return model.get_submodule(module_path(svp.spec, role))
    return svp.parked_of(name)[role]


def base_module(model: nn.Module, svp: SVPState, role: str) -> nn.Module:
    """The base model's version of a module, in use or parked."""
    if role not in svp.in_use:
        return model.get_submodule(module_path(svp.spec, role))
    return module_of(model, svp, BASE_ADAPTER, role)


def parameters_of(model: nn.Module, svp: SVPState, name: str) -> Iterator[nn.Parameter]:
    """All parameters of an adapter, its own modules' included."""
    yield from svp.adapter_named(name).parameters()
    for module in adapter_modules(model, name).values():
        yield from module.parameters()


def set_trainable(model: nn.Module, svp: SVPState, name: str, trainable: bool) -> None:
    """Set requires_grad of all parameters of an adapter."""
    for parameter in parameters_of(model, svp, name):
        parameter.requires_grad_(trainable)


def give_originals_back(model: nn.Module, svp: SVPState, name: str) -> None:
    """Before an adapter goes: objects of the base model that it trained become the base's again.

    None of the adapter's modules may stand in the model any more.
    """
    mine, base = svp.parked_of(name), svp.parked_of(BASE_ADAPTER)
    for role, original in svp.originals.items():
        known = base_module(model, svp, role)
        if role not in mine or mine[role] is not original or not are_alike(original, known):
            continue
        copy_tensors(original, known)
        original.requires_grad_(False)
        if svp.in_use[role] == BASE_ADAPTER:
            set_module(model, module_path(svp.spec, role), original)
        else:
            base[role] = original


def _check_tensors(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    missing, unexpected = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected)
    if missing or unexpected:
        raise AdapterKeyError(
            f"the tensors do not fit the adapter: {len(missing)} are missing {missing[:4]}, "
            f"{len(unexpected)} are unexpected {unexpected[:4]}. The adapter was made with another "
            "config or for another model; use its own config."
        )
    for key, tensor in expected.items():
        if tensor.shape != given[key].shape:
            raise AdapterShapeError(
                f"{key} has shape {tuple(given[key].shape)}, but the model needs "
                f"{tuple(tensor.shape)}. The adapter was made for another model or config."
            )
