"""`apply_svp` and `remove_svp`: one module `model.svp` and one hook object per block.

Nothing of the base model is renamed, wrapped or replaced. What `apply_svp` changes, and
`remove_svp` undoes:

    model.svp                an `SVPState`: every adapter, and every module that is not in use now
    model.<blocks>           each block gets a `PromptBlockInput` as forward pre-hook
    model.<owner>            gets a `CheckModelInput` as forward pre-hook
    model                    gets a `NoteReplica` as forward pre-hook, for nn.DataParallel
    model.head               trained by the adapter; a frozen copy is kept for the base model
    requires_grad            off for all but the adapter and its head
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping

import torch
from torch import nn

from svp_peft.backbones import BackboneSpec, find_backbone
from svp_peft.config import BASE_ADAPTER, SVPConfig, check_adapter_name
from svp_peft.errors import AlreadyAppliedError, BackboneNotSupportedError, ConfigError
from svp_peft.hooks import (
    CheckModelInput,
    NoteReplica,
    PromptBlockInput,
    check_flips,
    refused_arguments,
    remove_hooks,
)
from svp_peft.prompters import SVPAdapter
from svp_peft.sharded import refuse_sharded
from svp_peft.state import (
    SVPState,
    add_parts,
    are_alike,
    copy_tensors,
    module_path,
    patched_model,
    plain_path,
    roles_of,
    set_module,
    svp_of,
    use_modules_of,
)

_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def apply_svp(
    model: nn.Module,
    config: SVPConfig | None = None,
    *,
    adapter_name: str = "default",
    backbone: BackboneSpec | None = None,
) -> nn.Module:
    """Add SVP to `model` in place and freeze everything but the adapter and the head.

    Call it before `torch.compile`, before wrapping in DDP and before building the optimizer.
    The prompters are float32 (float64 in a float64 model), whatever the model's precision; the
    head keeps the model's. Until training the model computes bit for bit what it computes when
    frozen without SVP.

    Args:
        config: see `SVPConfig`; None takes the defaults.
        adapter_name: name of the first adapter; more can be added by `add_adapter`.
        backbone: where blocks and class tokens are, if the built-in records do not know.

    Returns:
        `model` itself.

    Raises:
        AlreadyAppliedError: the model carries SVP already.
        BackboneNotSupportedError: not a known Vision Mamba, or compiled, wrapped or on `meta`.
        ConfigError: `config` does not fit the model.
        InputError: `fully_shard` has spread the model over processes already.
        AdapterNameError: the name cannot be used.
        The model is unchanged whenever an error is raised.
    """
    name = check_adapter_name(adapter_name)
    spec = check_patchable(model, backbone)
    config = SVPConfig() if config is None else config
    adapter = build_adapter(model, spec, config)
    attach(model, spec, name, adapter, {})
    return model


def remove_svp(model: nn.Module) -> nn.Module:
    """Undo `apply_svp`: hooks, adapters, head and requires_grad are as they were before it.

    Returns `model`, bit for bit the base model. Adapters are lost; save them first.

    Raises:
        NotAppliedError: the model carries no SVP.
        BackboneNotSupportedError: the model is compiled; its graphs hold the prompts.
    """
    outer, model = model, patched_model(model)
    svp = svp_of(model)
    _refuse_compiled(outer, "remove_svp")
    # graphs or threads that still hold the state must not prompt any more
    svp.disabled += 1
    svp.routing = None
    use_modules_of(model, BASE_ADAPTER)
    for role, original in svp.originals.items():
        path = module_path(svp.spec, role)
        base = model.get_submodule(path)
        # an object that was rebuilt since (a parametrisation, a quantised head) cannot be the base
        # model's again, and the copy stays
        if original is not base and _is_parked(svp, original) and are_alike(original, base):
            copy_tensors(original, base)
            set_module(model, path, original)
    for module in model.modules():
        remove_hooks(module, svp)
    del model.svp
    for path, parameter in model.named_parameters():
        if plain_path(path) in svp.requires_grad_before:
            parameter.requires_grad_(svp.requires_grad_before[plain_path(path)])
    return outer


def check_patchable(model: nn.Module, backbone: BackboneSpec | None = None) -> BackboneSpec:
    """The complete spec of `model` if `apply_svp` can patch it; raises as `apply_svp` does."""
    if not isinstance(model, nn.Module):
        raise BackboneNotSupportedError(
            f"{type(model).__name__} is not a torch.nn.Module: svp_peft patches models in place. "
            "Pass the model itself."
        )
    if isinstance(model._modules.get("svp"), SVPState):
        raise AlreadyAppliedError(
            "this model already has an SVP adapter: a second one would prompt every block twice. "
            "Use add_adapter(model, name) for another adapter, load_adapter(model, path) to "
            "replace its weights, or remove_svp(model) to start over."
        )
    for path, module in model.named_modules():
        if isinstance(module, SVPState):
            raise AlreadyAppliedError(
                f"the module {path.removesuffix('.svp')!r} inside this model already has SVP "
                "adapters: its blocks would be prompted twice. Work on that module, or remove_svp "
                "it first."
            )
        if hasattr(module, "prompt_generator"):
            raise BackboneNotSupportedError(
                f"{type(module).__name__} is the released SVP model with prompts of its own "
                "(`prompt_generator`): its blocks would be prompted twice. Convert its checkpoint "
                "by convert_svp_checkpoint and load that into a plain Vim, for example "
                "load_vim('hustvl/Vim-small-midclstok')."
            )
    if hasattr(model, "svp"):
        raise BackboneNotSupportedError(
            f"{type(model).__name__} has an attribute `svp` of its own: svp_peft keeps its state "
            "under that name. Rename the attribute."
        )
    if type(model).__name__ in _WRAPPERS:
        raise BackboneNotSupportedError(
            f"the model is wrapped in {type(model).__name__}, which has already taken note of its "
            "parameters. Call apply_svp on the inner model first, then wrap it."
        )
    _refuse_compiled(model, "apply_svp")
    on_meta = [path for path, p in model.named_parameters() if p.is_meta]
    if on_meta:
        raise BackboneNotSupportedError(
            f"{len(on_meta)} parameters are on the meta device, {on_meta[0]!r} first: they have no "
            "values to prompt with. Load the weights first (model.to_empty and load_state_dict)."
        )
    fixed = [path for path, p in model.named_parameters() if p.is_inference()]
    if fixed:
        raise BackboneNotSupportedError(
            f"{len(fixed)} parameters were made under torch.inference_mode, {fixed[0]!r} first: "
            "such tensors take part in no training. Build or load the model outside of it."
        )
    refuse_sharded(model, "apply_svp")
    spec = find_backbone(model, backbone)
    if isinstance(model, (nn.Sequential, nn.ModuleList)):
        raise BackboneNotSupportedError(
            f"{type(model).__name__} runs or counts every module in it, and would take `svp` for "
            f"one of them. Call apply_svp on the model inside, at {spec.owner!r}."
        )
    check_flips(model.get_submodule(spec.owner), spec)
    return spec


def build_adapter(
    model: nn.Module, spec: BackboneSpec, config: SVPConfig, *, empty: bool = False
) -> SVPAdapter:
    """An adapter for `model`, on its device and of the right precision; not yet attached.

    Args:
        empty: leave the values undefined, and the random number generator untouched.
    """
    if not isinstance(config, SVPConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}, not an SVPConfig: only that checks its values. "
            "Pass SVPConfig(...), or SVPConfig.from_dict(...) for a dict."
        )
    if config.cross_source == "released" and (
        spec.class_tokens != "middle" or spec.reversed_blocks
    ):
        raise ConfigError(
            f"cross_source='released' needs a middle class token in every block, but this model's "
            f"are {spec.class_tokens!r}: the authors' code knows no other. Use "
            "cross_source='token'."
        )
    for role in config.modules_to_save:
        check_role(model, spec, role)
    _check_apart(model, spec, config)
    weight = next(p for p in model.get_submodule(spec.blocks[0]).parameters())
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.device("meta" if empty else weight.device):
        adapter = SVPAdapter(spec.widths, spec.depth, config)
    if empty:
        adapter.to_empty(device=weight.device)
    return adapter.to(dtype=dtype).train(model.training)


def attach(
    model: nn.Module,
    spec: BackboneSpec,
    name: str,
    adapter: SVPAdapter,
    modules: Mapping[str, nn.Module],
) -> SVPState:
    """Patch `model` with a ready adapter; nothing in here fails.

    Args:
        modules: the adapter's own modules by role. A role of the config that is missing here is
            trained in the object that the model has, and a frozen copy is kept for the base.
    """
    # blocks may be wrapped before it ends, for example to recompute their activations
    before = {plain_path(path): p.requires_grad for path, p in model.named_parameters()}
    svp = SVPState(spec, before)
    bases = {
        role: copy.deepcopy(model.get_submodule(module_path(spec, role)))
        for role in roles_of(spec, adapter.config)
        if role not in modules
    }
    model.requires_grad_(False)
    model.svp = svp.train(model.training)
    add_parts(model, name, adapter, modules, bases)
    svp.active = name
    use_modules_of(model, name)
    for index, path in enumerate(spec.blocks):
        hook = PromptBlockInput(
            svp,
            index,
            spec.widths[index],
            spec.class_tokens,
            index in spec.reversed_blocks,
            spec.input_name,
            spec.layout,
        )
        model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
    model.register_forward_pre_hook(NoteReplica(svp))
    owner = model.get_submodule(spec.owner)
    owner.register_forward_pre_hook(
        CheckModelInput(svp, refused_arguments(owner)), with_kwargs=True
    )
    return svp


def check_role(model: nn.Module, spec: BackboneSpec, role: str) -> None:
    """Raise `ConfigError` if no adapter can have its own copy of the module that `role` names."""
    if role == "head" and spec.head is None:
        return
    path = module_path(spec, role)
    exists = path in dict(model.named_modules())
    holds_blocks = any(f"{block}.".startswith(f"{path}.") for block in spec.blocks)
    if not exists or holds_blocks or path.split(".")[0] == "svp":
        why = "holds blocks" if holds_blocks else "does not exist" if not exists else "is ours"
        raise ConfigError(
            f"modules_to_save names {role!r}, which {why}: an adapter cannot have its own copy. "
            f"The model's modules are {[name for name, _ in model.named_children()]}. "
            "Name existing modules outside the stack of blocks, such as 'head'."
        )
    for name, parameter in model.get_submodule(path).named_parameters():
        if not parameter.is_floating_point():
            raise ConfigError(
                f"modules_to_save names {role!r}, but its {name} is {parameter.dtype}: an adapter "
                "trains its own copy, and only floating-point numbers have gradients. Put a "
                "module that is not quantised there, or leave it out of modules_to_save."
            )


def _check_apart(model: nn.Module, spec: BackboneSpec, config: SVPConfig) -> None:
    """Raise `ConfigError` if one module of `modules_to_save`, of any adapter, is part of another.

    Their copies are put in and out independently, and one would carry the other away.
    """
    svp = model._modules.get("svp")
    known = svp.in_use if isinstance(svp, SVPState) else ()
    roles = dict.fromkeys([*known, *roles_of(spec, config)])
    paths = {role: module_path(spec, role) for role in roles}
    for (outer, whole), (inner, part) in itertools.permutations(paths.items(), 2):
        if f"{part}.".startswith(f"{whole}."):
            raise ConfigError(
                f"modules_to_save names {outer!r} and {inner!r} (the other may be another "
                f"adapter's), and {part!r} is part of {whole!r}: two copies of it would stand in "
                "each other's way. Name the outer one in all adapters, or none that overlap."
            )


def _refuse_compiled(model: nn.Module, action: str) -> None:
    for path, module in model.named_modules():
        # OptimizedModule of torch.compile, and the graph that nn.Module.compile leaves
        if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None):
            raise BackboneNotSupportedError(
                f"the {f'module {path!r}' if path else 'model'} is compiled, and compiled graphs "
                f"take no notice of hooks that come or go: {action} would have no effect on it. "
                f"Call {action} on the model before torch.compile."
            )


def _is_parked(svp: SVPState, module: nn.Module) -> bool:
    return any(m is module for m in svp.parked.modules())
