"""`SVPState`, registered as `model.svp`: all adapters of a model and the modules not in use.

A module that adapters train a copy of (the head) stands in the model in one version at a time; the
versions of the other adapters and of the base model wait here. So every tensor is registered
exactly once, and the base model's state_dict keys never change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from svp_peft.backbones import BackboneSpec
from svp_peft.config import BASE_ADAPTER, SVPConfig
from svp_peft.errors import AdapterNameError, NotAppliedError
from svp_peft.prompters import NamedModules, SVPAdapter, simam

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


class Routing(Protocol):
    """What `svp_peft.route` puts in place of the active adapter; see routing.py."""

    def check_batch(self, batch: int) -> None: ...

    def images(self, svp: SVPState, images: Tensor) -> Tensor: ...

    def prompt(self, svp: SVPState, x: Tensor, block: int, skip: tuple[int, ...]) -> Tensor: ...


class SVPState(nn.Module):
    """Everything svp_peft adds to a model, registered on it as `model.svp`.

    Attributes:
        adapters: SVPAdapter of every adapter, by name.
        parked: by adapter name ("__base__" for the base model), the modules of
            `modules_to_save` that are not in use now. Those in use are in the model itself, so
            that every tensor is registered exactly once.
        active: name of the adapter in use unless disabled.
        spec: what the backbone was found to be.
    """

    def __init__(self, spec: BackboneSpec, requires_grad: Mapping[str, bool]) -> None:
        super().__init__()
        self.spec = spec
        self.requires_grad_before = dict(requires_grad)
        self.adapters = NamedModules()
        self.parked = NamedModules()
        self.parked[BASE_ADAPTER] = NamedModules()
        self.active = BASE_ADAPTER
        self.disabled = 0
        self.routing: Routing | None = None
        # by role: whose module stands in the model now, and the object that stood there at first
        self.in_use: dict[str, str] = {}
        self.originals: dict[str, nn.Module] = {}

    @property
    def effective(self) -> str:
        """The active adapter's name, or "__base__" while disabled."""
        return BASE_ADAPTER if self.disabled else self.active

    @property
    def adapter(self) -> SVPAdapter:
        """The active adapter."""
        return self.adapter_named(self.active)

    @property
    def config(self) -> SVPConfig:
        """The active adapter's config."""
        return self.adapter.config

    def adapter_named(self, name: str) -> SVPAdapter:
        """The adapter `name`, which must exist."""
        return self.adapters[name]  # type: ignore[return-value]

    def has(self, name: object) -> bool:
        """Whether there is an adapter `name`."""
        return isinstance(name, str) and name in self.adapters

    def require(self, name: str) -> SVPAdapter:
        """The adapter `name`; raises `AdapterNameError` where there is none."""
        if not self.has(name):
            raise AdapterNameError(
                f"there is no adapter {name!r} in this model: its adapters are "
                f"{self.adapters.names()}. Use one of these, or add_adapter(model, {name!r}) first."
            )
        return self.adapter_named(name)

    def parked_of(self, name: str) -> NamedModules:
        """Modules of adapter `name` that are not in use, by role."""
        return self.parked[name]  # type: ignore[return-value]

    @property
    def alpha(self) -> nn.Parameter | nn.ParameterList | None:
        """The active adapter's learned scales of the cross prompts, (groups, d_model)."""
        return self.adapter.alpha

    @property
    def beta(self) -> nn.Parameter | nn.ParameterList | None:
        """The active adapter's learned scales of the inner prompts, (depth, d_model)."""
        return self.adapter.beta

    @property
    def cross(self) -> NamedModules:
        """The active adapter's cross prompters, by group."""
        return self.adapter.cross

    @property
    def inner(self) -> NamedModules:
        """The active adapter's inner prompters, by block."""
        return self.adapter.inner

    def forward(self, x: Tensor, block_index: int, skip: tuple[int, ...]) -> Tensor:
        """Tokens entering a block, float (batch, L, d_model) -> the same with prompts, if any."""
        if self.disabled:
            return x
        if self.routing is not None:
            return self.routing.prompt(self, x, block_index, skip)
        return self.adapters[self.active](x, block_index, skip)

    def images(self, images: Tensor) -> Tensor:
        """Images entering the model -> the same, weighed by SimAM where the config says so."""
        if self.disabled:
            return images
        if self.routing is not None:
            return self.routing.images(self, images)
        return simam(images) if self.adapter.config.simam_input else images

    def extra_repr(self) -> str:
        return f"active={self.active!r}, family={self.spec.family!r}"


def svp_of(model: nn.Module) -> SVPState:
    """The `SVPState` of a patched model.

    Raises:
        NotAppliedError: the model carries none.
    """
    svp = getattr(patched_model(model), "svp", None)
    assert isinstance(svp, SVPState)
    return svp


def patched_model(model: nn.Module) -> nn.Module:
    """The module that `apply_svp` patched: `model`, or the one inside it or its wrappers.

    Raises:
        NotAppliedError: there is none, or there are several.
    """
    if isinstance(model, nn.Module) and isinstance(model._modules.get("svp"), SVPState):
        return model
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [m for m in modules if isinstance(m._modules.get("svp"), SVPState)]
    if len(found) == 1:
        return found[0]
    if found:
        raise NotAppliedError(
            f"{type(model).__name__} holds {len(found)} models with SVP adapters: it is not clear "
            "which one is meant. Pass that model itself."
        )
    raise NotAppliedError(
        f"{type(model).__name__} carries no SVP adapter: it was never patched, or remove_svp "
        "was called. Call apply_svp(model, SVPConfig()) or load_adapter(model, path) first."
    )


def add_parts(
    model: nn.Module,
    name: str,
    adapter: SVPAdapter,
    modules: Mapping[str, nn.Module],
    bases: Mapping[str, nn.Module] | None = None,
) -> None:
    """Register an adapter and its own modules with a patched model, parked and trainable.

    Args:
        bases: by role, a copy that becomes the base model's, while the adapter takes the object
            that stands in the model now.
    """
    svp = svp_of(model)
    roles = roles_of(svp.spec, adapter.config)
    base, own = svp.parked_of(BASE_ADAPTER), NamedModules()
    # what may fail comes first
    for role in roles:
        if role in modules:
            own[role] = modules[role].requires_grad_(True)
    svp.parked[name] = own
    svp.adapters[name] = adapter
    for role in roles:
        if role not in svp.in_use:
            svp.originals[role] = model.get_submodule(module_path(svp.spec, role))
            svp.in_use[role] = BASE_ADAPTER
        if role not in modules and bases is not None:
            base[role] = bases[role].requires_grad_(False)
            svp.in_use[role] = name
            svp.originals[role].requires_grad_(True)


def use_modules_of(model: nn.Module, name: str) -> None:
    """Put the modules of adapter `name` into the model and park those that stand there."""
    svp = svp_of(model)
    roles = () if name == BASE_ADAPTER else svp.adapter_named(name).config.modules_to_save
    for role, current in svp.in_use.items():
        owner = name if role in roles else BASE_ADAPTER
        if owner == current:
            continue
        path = module_path(svp.spec, role)
        svp.parked_of(current)[role] = model.get_submodule(path)
        set_module(model, path, svp.parked_of(owner).pop(role))
        svp.in_use[role] = owner


def roles_of(spec: BackboneSpec, config: SVPConfig) -> tuple[str, ...]:
    """The entries of `modules_to_save` that exist in the model: a dense backbone has no head."""
    return tuple(r for r in config.modules_to_save if r != "head" or spec.head is not None)


def module_path(spec: BackboneSpec, role: str) -> str:
    """Path in the model of an entry of `modules_to_save`: "head" is wherever the head is."""
    return spec.head if role == "head" and spec.head is not None else role


def plain_path(path: str) -> str:
    """`path` without what torch.compile, FSDP and activation checkpointing put in between."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a dotted path of `model`, keeping the order of its neighbours."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def are_alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether the modules have tensors of the same shapes: nobody has rebuilt one of them."""

    def shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
        named = (*module.named_parameters(), *module.named_buffers())
        return [(name, tensor.shape) for name, tensor in named]

    return shapes(one) == shapes(other)


def copy_tensors(target: nn.Module, source: nn.Module) -> None:
    """Copy all parameters and buffers of `source` into `target`, and drop `target`'s gradients."""
    pairs = [
        *zip(target.parameters(), source.parameters(), strict=True),
        *zip(target.buffers(), source.buffers(), strict=True),
    ]
    with torch.no_grad():
        for new, old in pairs:
            new.copy_(old)
            new.grad = None
