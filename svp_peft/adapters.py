"""Named adapters of one model: add, set, delete, disable, status, average, and their tensors.

Every function takes the patched model, or a DDP or `torch.compile` wrapper or larger module around
it. None of them changes requires_grad by the way: only `set_adapter(..., trainable=...)` and
`install_adapter(..., trainable=...)` do, because they are asked to.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NoReturn

import torch
from torch import Tensor, nn

from svp_peft.adapter_tensors import (
    adapter_state,
    base_module,
    check_new_name,
    give_originals_back,
    install_adapter,
    parameters_of,
    prepare_adapter,
    refuse_while_routing,
    set_trainable,
)
from svp_peft.config import SVPConfig
from svp_peft.errors import (
    AdapterNameError,
    InputError,
    MergeError,
)
from svp_peft.heads import head_for
from svp_peft.patch import build_adapter
from svp_peft.sharded import refuse_sharded
from svp_peft.state import (
    add_parts,
    patched_model,
    roles_of,
    svp_of,
    use_modules_of,
)


@dataclass(frozen=True)
class ModelStatus:
    """What `get_model_status` found; the field names are peft's."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Literal["irregular"]]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def list_adapters(model: nn.Module) -> list[str]:
    """Names of the model's adapters, in the order they were added."""
    return svp_of(model).adapters.names()


def add_adapter(
    model: nn.Module,
    name: str,
    config: SVPConfig | None = None,
    *,
    num_classes: int | None = None,
    head: nn.Module | None = None,
) -> None:
    """Add a fresh adapter with a head of its own to a patched model; the active one stays active.

    Args:
        config: None takes the active adapter's.
        num_classes: outputs of a fresh head; None copies the base model's head.
        head: the adapter's head itself, instead of `num_classes`.

    The new adapter and its head are trainable; call `set_adapter(model, name, trainable=True)` to
    use it and freeze the others.

    Raises:
        AdapterNameError: the name is malformed, reserved or taken.
        ConfigError, InputError: `config` or the head does not fit the model, or `fully_shard` has
            spread it over processes already.
        NotAppliedError: the model carries no SVP; use `apply_svp` for the first adapter.
    """
    model = patched_model(model)
    svp = svp_of(model)
    check_new_name(svp, name)
    refuse_sharded(model, "add_adapter")
    config = svp.config if config is None else config
    adapter = build_adapter(model, svp.spec, config)
    modules: dict[str, nn.Module] = {}
    for role in roles_of(svp.spec, config):
        modules[role] = copy.deepcopy(base_module(model, svp, role))
    if num_classes is not None or head is not None:
        if "head" not in modules:
            raise InputError(
                f"adapter {name!r} cannot get a head: its modules_to_save are "
                f"{config.modules_to_save} and the model's head is {svp.spec.head!r}. Use a config "
                "with modules_to_save=('head',), or leave num_classes and head out."
            )
        if num_classes is not None and head is not None:
            raise InputError(
                f"add_adapter got num_classes={num_classes} and a head: they may contradict each "
                "other. Pass one of them."
            )
        if head is not None and not isinstance(head, nn.Module):
            raise InputError(
                f"head is a {type(head).__name__}, not a torch.nn.Module: it must turn the model's "
                "features into logits. Pass a module, or num_classes for a fresh one."
            )
        base = modules["head"]
        modules["head"] = head_for(base, num_classes, svp.spec.widths[-1]) if head is None else head  # type: ignore[arg-type]
    for module in modules.values():
        module.train(model.training)
    add_parts(model, name, adapter, modules)


def set_adapter(model: nn.Module, name: str, *, trainable: bool | None = None) -> None:
    """Make `name` the active adapter: its prompters are used and its head stands in the model.

    A compiled model compiles once for each adapter that it meets, up to
    `torch._dynamo.config.recompile_limit` (8), then falls back to eager, or fails with
    `fullgraph=True`. For more adapters, `hotswap_adapter` puts other weights into one of them.

    Args:
        trainable: True also makes this adapter and its head trainable and freezes every other
            one; False freezes this one; None leaves all requires_grad flags alone.

    Raises:
        AdapterNameError: there is no such adapter.
        InputError: inside `route`, where every image has its own.
    """
    model = patched_model(model)
    svp = svp_of(model)
    svp.require(name)
    refuse_while_routing(svp, "set_adapter")
    svp.active = name
    use_modules_of(model, svp.effective)
    if trainable is not None:
        others = svp.adapters.names() if trainable else [name]
        for other in others:
            set_trainable(model, svp, other, trainable and other == name)


def delete_adapter(model: nn.Module, name: str, *, new_active: str | None = None) -> None:
    """Delete an adapter and its head.

    Args:
        new_active: adapter to use afterwards; needed when `name` is the active one.

    Raises:
        AdapterNameError: there is no such adapter, it is the last one, or it is active and no
            `new_active` was given.
        InputError: inside `route`.
    """
    model = patched_model(model)
    svp = svp_of(model)
    svp.require(name)
    refuse_while_routing(svp, "delete_adapter")
    others = [other for other in svp.adapters.names() if other != name]
    if not others:
        raise AdapterNameError(
            f"adapter {name!r} is the last one of this model: without any there is nothing to "
            "apply. Call remove_svp(model) to get the base model back."
        )
    if new_active is not None:
        svp.require(new_active)
    if new_active == name or (new_active is None and svp.active == name):
        raise AdapterNameError(
            f"adapter {name!r} is the active one, and no other was chosen to take its place. "
            f"Pass new_active= one of {others}."
        )
    svp.active = svp.active if new_active is None else new_active
    use_modules_of(model, svp.effective)
    give_originals_back(model, svp, name)
    svp.adapters.pop(name)
    svp.parked.pop(name)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes, bit for bit, what it did before `apply_svp`.

    Prompts are off and the base model's own head is back. Nests; ends also on an exception.
    requires_grad is not touched.
    """
    model = patched_model(model)
    svp = svp_of(model)
    svp.disabled += 1
    use_modules_of(model, svp.effective)
    try:
        yield
    finally:
        svp.disabled -= 1
        if model._modules.get("svp") is svp:
            use_modules_of(model, svp.effective)


def average_adapters(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    new_name: str = "average",
) -> None:
    """Add an adapter whose every tensor is the weighted mean of those of `names`.

    The prompters are not linear, so this is a mean of parameters and not of outputs; it makes
    sense for adapters trained from the same start, as in weight averaging.

    Args:
        weights: relative weights, not negative; None weighs all alike. They are divided by their
            sum.

    Raises:
        AdapterNameError: a name is unknown, or `new_name` cannot be used.
        InputError: configs or shapes differ, or the weights cannot be used.
    """
    model = patched_model(model)
    svp = svp_of(model)
    check_new_name(svp, new_name)
    refuse_sharded(model, "average_adapters")
    names = list(names)
    if not names:
        raise InputError("average_adapters needs at least one adapter: names is empty. Name some.")
    states = [adapter_state(model, name) for name in names]
    try:
        shares = [1.0] * len(names) if weights is None else [float(w) for w in weights]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"weights={weights!r} are not numbers ({error}): each adapter needs one. Pass for "
            f"example {[1.0] * len(names)}."
        ) from error
    usable = all(math.isfinite(w) and w >= 0 for w in shares) and sum(shares) > 0
    if len(shares) != len(names) or not usable:
        raise InputError(
            f"weights={shares} do not fit {len(names)} adapters: one finite weight of at least 0 "
            "is needed for each, and they must not all be 0. Leave them out for the plain mean."
        )
    configs = [svp.require(name).config for name in names]
    shapes = [{key: tensor.shape for key, tensor in state.items()} for state in states]
    for name, config, shape in zip(names, configs, shapes, strict=True):
        if config != configs[0] or shape != shapes[0]:
            raise InputError(
                f"adapters {names[0]!r} and {name!r} cannot be averaged: their configs or the "
                "shapes of their tensors (number of classes?) differ. Average equal ones only."
            )
    total = sum(shares)
    mean: dict[str, Tensor] = {}
    for key, first in states[0].items():
        mean[key] = first
        if first.is_floating_point():
            terms = [s[key].double() * (w / total) for s, w in zip(states, shares, strict=True)]
            mean[key] = torch.stack(terms).sum(0)
    prepared = prepare_adapter(model, configs[0], mean)
    install_adapter(model, new_name, prepared, activate=False)


def merge_and_unload(model: nn.Module) -> NoReturn:
    """Cannot be done, and says why: SVP prompts depend on the input."""
    svp_of(model)
    raise MergeError(
        "SVP cannot be merged into the base weights: its prompts depend on the input through a "
        "SiLU, so no fixed weight equals them. Keep the adapter, or call remove_svp(model) to get "
        "the base model back."
    )


def get_model_status(model: nn.Module) -> ModelStatus:
    """Adapters, parameter counts and flags of a patched model, under peft's field names."""
    outer, model = model, patched_model(model)
    svp = svp_of(model)
    flags: dict[str, bool | Literal["irregular"]] = {}
    devices: dict[str, list[str]] = {}
    for name in svp.adapters.names():
        parameters = list(parameters_of(model, svp, name))
        found = {p.requires_grad for p in parameters}
        flags[name] = found.pop() if len(found) == 1 else "irregular"
        devices[name] = sorted({p.device.type for p in parameters})
    trainable, total = count_parameters(outer)
    return ModelStatus(
        base_model_type=type(model).__name__,
        adapter_model_type="SVPAdapter",
        peft_types={name: "SVP" for name in svp.adapters.names()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(svp.adapter.layers),
        enabled=svp.disabled == 0,
        active_adapters=[svp.active],
        merged_adapters=[],
        requires_grad=flags,
        available_adapters=svp.adapters.names(),
        devices=devices,
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of `model`."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print the parameter counts in one line, in peft's format."""
    trainable, total = count_parameters(model)
    print(
        f"trainable params: {trainable:,d} || all params: {total:,d} || "
        f"trainable%: {100 * trainable / max(total, 1):.4f}"
    )
