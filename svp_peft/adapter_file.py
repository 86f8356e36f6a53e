"""`save_adapter`, `load_adapter`, `hotswap_adapter`: between a model and the two files on disk.

    adapter_config.json         what the adapter is: `adapter_config.AdapterInfo`
    adapter_model.safetensors   its tensors, and the config once more: `adapter_format`

docs/adapter_file.md gives both byte for byte. A folder holds one adapter; the adapter's name in
the model is not part of it, so it can be loaded under any other.

Loading reads and checks everything first, then builds the adapter beside the model, and attaches
it only when nothing can fail any more: after an error the model is what it was.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from svp_peft.adapter_build import CheckBaseModel, base_parameters, check_base, prepare
from svp_peft.adapter_config import AdapterInfo
from svp_peft.adapter_format import encode
from svp_peft.adapter_store import HubOptions, read_adapter, write_folder
from svp_peft.adapter_tensors import adapter_state, copy_into_adapter, install_adapter
from svp_peft.backbones import BackboneSpec
from svp_peft.base_model import base_arch, base_fingerprint
from svp_peft.config import check_adapter_name
from svp_peft.download import is_repo_id, library_version
from svp_peft.errors import (
    AdapterConfigError,
    AdapterNameError,
    AdapterShapeError,
    AdapterWeightsError,
    InputError,
)
from svp_peft.patch import check_patchable
from svp_peft.sharded import has_shards, refuse_sharded, whole
from svp_peft.state import SVPState, patched_model, svp_of

logger = logging.getLogger(__name__)

# fields that do not change which tensors an adapter has or what it computes in eval mode
_FREE = ("base_model_name_or_path", "revision", "dropout")


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_main_process: bool = True,
) -> Path:
    """Write one adapter and its head to `folder`; an adapter that is there is replaced.

    Both files are complete before the old ones are replaced, so a crash at any moment leaves the
    old adapter or the new one, whole. The folder may be the one the adapter was loaded from.

    Args:
        model: a patched model; DDP, DataParallel and torch.compile wrappers are looked through.
        folder: made if it does not exist.
        adapter_name: which adapter.
        is_main_process: False writes nothing, for all processes but one of a distributed run.
            Of a model that `fully_shard` has spread over processes every one must call this, for
            its part of the values.

    Returns:
        `folder`.

    Raises:
        NotAppliedError, AdapterNameError: there is no such adapter in the model.
        AdapterWeightsError: a tensor is not finite or is a shard; nothing was written.
        AdapterSaveError: the disk is full, the folder may not be written, ...
    """
    if is_main_process or has_shards(model):
        files = encode_adapter(model, adapter_name)
        if is_main_process:
            write_folder(folder, *files)
    return Path(folder)


def load_adapter(
    model: nn.Module,
    path_or_repo: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    load_head: bool = True,
    strict: bool = True,
    overwrite: bool = False,
    check_base_model: CheckBaseModel = "warn",
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    backbone: BackboneSpec | None = None,
) -> nn.Module:
    """Load an adapter from a folder or the Hub into `model`, in place.

    A model without SVP is patched and the adapter becomes active; in a patched model it is added
    beside the others and `set_adapter` makes it active. The head comes with the adapter and may
    have another number of classes than the model's own, which `disable_adapter` brings back.

    Args:
        model: the base model the adapter was trained on, patched or not.
        path_or_repo: a folder, which wins if it exists, or a Hub id "owner/name".
        adapter_name: name the adapter gets in this model.
        is_trainable: whether its tensors require gradients. The model's train/eval mode stays.
        load_head: False leaves the file's head out and copies the base model's.
        strict: False leaves missing tensors as freshly initialised and ignores unexpected ones,
            with a warning that names them.
        overwrite: replace the adapter of this name if there is one.
        check_base_model: what to do when the base has the right geometry but other weights than
            in training: "warn", "error" or "ignore". A wrong geometry is always an error.
        revision, subfolder, token, cache_dir, force_download, local_files_only: for the Hub; both
            files come from one commit. `subfolder` works in folders too.
        backbone: where blocks and class tokens are, if the built-in records do not know.

    Returns:
        `model` itself.

    Raises:
        AdapterNotFoundError, HubError: there is no adapter, or it cannot be had.
        AdapterConfigError: adapter_config.json is damaged, of another kind, or too new.
        AdapterWeightsError (AdapterKeyError, AdapterShapeError): the tensors are not a whole,
            healthy adapter that fits the config.
        BaseModelMismatchError: the adapter was trained on another base model.
        AdapterNameError: the name is malformed, reserved or taken.
        BackboneNotSupportedError: the model is not a supported one, compiled, or on `meta`.
        InputError: `fully_shard` has spread the model over processes already.
        The model is unchanged, bit for bit, whenever an error is raised.
    """
    if check_base_model not in get_args(CheckBaseModel):
        raise InputError(
            f"check_base_model={check_base_model!r} is unknown: it says what to do when the base "
            f"has other weights than in training. Use one of {list(get_args(CheckBaseModel))}."
        )
    name = check_adapter_name(adapter_name)
    refuse_sharded(model, "load_adapter")
    patched = is_patched(model)
    if patched:
        model, outer = patched_model(model), model
        spec = svp_of(model).spec
        if name in svp_of(model).adapters and not overwrite:
            raise AdapterNameError(
                f"the model already has an adapter {name!r}, whose weights would be lost. Load "
                "under another adapter_name, pass overwrite=True, or use hotswap_adapter."
            )
    else:
        outer, spec = model, check_patchable(model, backbone)
    options = HubOptions(
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        force_download=force_download,
        local_files_only=local_files_only,
    )
    contents = read_adapter(path_or_repo, options)
    check_base(model, spec, contents, check_base_model)
    prepared = prepare(model, spec, contents, load_head=load_head, strict=strict)
    install_adapter(
        model, name, prepared, activate=not patched, trainable=is_trainable, overwrite=overwrite
    )
    return outer


def hotswap_adapter(
    model: nn.Module,
    path_or_repo: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    check_base_model: CheckBaseModel = "warn",
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> nn.Module:
    """Copy an adapter from disk into the existing tensors of `adapter_name`.

    No tensor is replaced, so compiled models and captured CUDA graphs compute the new adapter from
    the next call on, and optimizers keep their parameters.

    Args:
        model: a patched model; DDP and torch.compile wrappers are looked through.
        The others are those of `load_adapter`.

    Returns:
        `model` itself.

    Raises:
        AdapterNameError: the model has no such adapter.
        AdapterConfigError, AdapterShapeError: the file's has another config or head.
        Otherwise as `load_adapter`; the adapter is unchanged whenever an error is raised.
    """
    inner = patched_model(model)
    svp = svp_of(inner)
    current = svp.require(adapter_name).config
    options = HubOptions(
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        force_download=force_download,
        local_files_only=local_files_only,
    )
    contents = read_adapter(path_or_repo, options)
    check_base(inner, svp.spec, contents, check_base_model)
    prepared = prepare(inner, svp.spec, contents)
    ours, theirs = current.to_dict(), contents.info.svp.to_dict()
    differs = [key for key in ours if key not in _FREE and ours[key] != theirs[key]]
    if differs:
        raise AdapterConfigError(
            f"{contents.where} cannot be copied into adapter {adapter_name!r}: their {differs} "
            "differ. Load it under another adapter_name with load_adapter."
        )
    source = prepared.adapter.state_dict(prefix="svp.")
    for role, module in prepared.modules.items():
        source |= module.state_dict(prefix=f"{role}.")
    target = {key: tensor.shape for key, tensor in adapter_state(inner, adapter_name).items()}
    if target != {key: tensor.shape for key, tensor in source.items()}:
        raise AdapterShapeError(
            f"{contents.where} cannot be copied into adapter {adapter_name!r}: their heads differ. "
            "Load it under another adapter_name with load_adapter."
        )
    copy_into_adapter(inner, adapter_name, source)
    return model


def encode_adapter(model: nn.Module, adapter_name: str) -> tuple[bytes, bytes]:
    """The bytes of both files of one adapter of `model`; raises as `save_adapter`."""
    model = patched_model(model)
    svp_of(model).require(adapter_name)
    state = {key: whole(tensor) for key, tensor in adapter_state(model, adapter_name).items()}
    for key, tensor in state.items():
        if tensor.numel() == 0 or tensor.is_meta:
            raise AdapterWeightsError(
                f"{key} of adapter {adapter_name!r} has no values here (shape "
                f"{tuple(tensor.shape)}): the model is sharded or on the meta device. Gather the "
                "parameters first, for example in a `summon_full_params` block. Nothing was saved."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterWeightsError(
                f"{key} of adapter {adapter_name!r} holds NaN or infinite values: training "
                "diverged. Nothing was saved, and an earlier file is as it was."
            )
    return encode(adapter_info(model, adapter_name, state), state)


def adapter_info(model: nn.Module, adapter_name: str, state: Mapping[str, Tensor]) -> AdapterInfo:
    """What adapter_config.json says of an adapter of `model`."""
    svp = svp_of(model)
    spec, config = svp.spec, svp.adapter_named(adapter_name).config
    base = config.base_model_name_or_path
    if base is not None and (not is_repo_id(base) or Path(base).exists()):
        # a path of this machine means nothing elsewhere, and the Hub refuses it in a model card
        logger.info("base_model_name_or_path=%r is not a Hub id and is left out of the file", base)
        config = replace(config, base_model_name_or_path=None)
    parameters = base_parameters(model)
    return AdapterInfo(
        svp=config,
        base_arch=base_arch(parameters, spec.blocks, spec.widths, spec.class_tokens),
        base_fingerprint=base_fingerprint(parameters, spec.blocks, config.modules_to_save),
        num_classes=count_classes(state),
        svp_peft_version=library_version(),
        weights_sha256=None,
    )


def count_classes(state: Mapping[str, Tensor]) -> int | None:
    """Outputs of the head: the first size of its last weight matrix; None without a head.

    Numbered layers go by their numbers, because files keep tensors in no particular order; named
    ones as `state` has them.
    """
    outputs = head_outputs(state)
    return outputs[-1] if outputs else None


def head_outputs(state: Mapping[str, Tensor]) -> list[int]:
    """First sizes of the head's weight matrices, in the order of `count_classes`."""
    matrices = [k for k, tensor in state.items() if k.startswith("head.") and tensor.dim() == 2]
    matrices.sort(key=lambda k: [int(p) if p.isdecimal() else 0 for p in k.split(".")])
    return [state[key].shape[0] for key in matrices]


def is_patched(model: nn.Module) -> bool:
    """Whether `model`, or a model inside it or its wrappers, carries SVP."""
    return isinstance(model, nn.Module) and any(isinstance(m, SVPState) for m in model.modules())
