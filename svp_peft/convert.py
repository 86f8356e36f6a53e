"""The authors' checkpoints in and out: `convert_svp_checkpoint` and `export_svp_checkpoint`.

A checkpoint of the released code holds the whole model. What it trains maps one to one:

    prompt_generator.{l}.0.*          svp.inner.{l}.down.*
    prompt_generator.{l}.1.*          svp.inner.{l}.up.*
    prompt_generator_shared.{g}.0.*   svp.cross.{g}.*
    prompt_shared_scale               svp.alpha
    prompt_scale[:depth]              svp.beta
    prompt_scale[depth:]              released.unused_scale_rows, kept for the way back
    head.* (head.0.*, head.1.*)       head.*

Source: AAAI2025-SVP at 5ea376c, svp/model/models_mamba.py lines 288-355, main.py lines 276-303.
"""

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svp_peft.adapter_build import check_contents
from svp_peft.adapter_config import AdapterInfo
from svp_peft.adapter_file import count_classes
from svp_peft.adapter_format import UNUSED_SCALE_ROWS, AdapterContents, encode, plain_key
from svp_peft.adapter_store import HubOptions, read_adapter, write_folder
from svp_peft.base_model import base_arch, base_fingerprint, differences
from svp_peft.config import SVPConfig
from svp_peft.download import library_version
from svp_peft.errors import BaseModelMismatchError, CheckpointError, InputError
from svp_peft.vim.files import load_pickle, read_checkpoint

# RELEASED CODE: models_mamba.py:308 makes the scale 24 rows high whatever the depth.
# Pinned by tests/test_convert.py.
RELEASED_SCALE_ROWS = 24

_RELEASED_BOTTLENECKS = (64, 128)
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INNER = re.compile(r"prompt_generator\.(\d+)\.([01])\.(weight|bias)")
_CROSS = re.compile(r"prompt_generator_shared\.(\d+)\.0\.(weight|bias)")


def convert_svp_checkpoint(
    path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    simam_input: bool | None = None,
    use_ema: bool = False,
    base_model_name_or_path: str | None = None,
    revision: str | None = None,
) -> Path:
    """Write the adapter in a checkpoint of the released SVP code to a folder for `load_adapter`.

    No code in the file is run: only tensors, plain containers and `argparse.Namespace` are read.
    The adapter gets `cross_source="released"`, which reproduces the released logits.

    Args:
        path: `checkpoint.pth` as the released main.py saves it, or a state_dict in a `.pth` or
            `.safetensors` file.
        out_dir: folder for the adapter.
        simam_input: whether the model was trained with `input_relu`. It cannot be told from the
            weights, so it must be given where the file's `args` do not say.
        use_ema: take `model_ema`, the moving average that main.py saves beside the model.
        base_model_name_or_path: Hub id of the base model, for the adapter's config.
        revision: its revision.

    Returns:
        `out_dir`.

    Raises:
        CheckpointError: not a checkpoint of the released SVP code, damaged, unsafe, or one that
            the released code itself cannot run (`mlp384*32`).
        InputError: `simam_input` is not known, or contradicts the file.
        AdapterSaveError: `out_dir` cannot be written.
    """
    path = Path(path).expanduser()
    state, args = _read(path, use_ema)
    tensors, depth, groups = _adapter_tensors(state, path)
    group_size = depth // groups
    if args.get("shared_layers", group_size) != group_size:
        raise CheckpointError(
            f"{path}: args say shared_layers={args['shared_layers']}, but {groups} shared prompt "
            f"generators for {depth} blocks make it {group_size}. The file mixes two runs: use "
            "the checkpoint of one."
        )
    config = SVPConfig(
        inner_bottleneck=tensors["svp.inner.0.down.weight"].shape[0],
        cross_group_size=group_size,
        cross_source="released",
        simam_input=_simam(args, simam_input, path),
        base_model_name_or_path=base_model_name_or_path,
        revision=revision,
    )
    d_model = tensors["svp.beta"].shape[1]
    blocks = [f"layers.{index}" for index in range(depth)]
    arch = base_arch(state, blocks, [d_model] * depth, "middle")
    fingerprint = None
    if arch["block_parameters"]:
        fingerprint = base_fingerprint(state, blocks)
    else:
        del arch["block_parameters"]
    info = AdapterInfo(
        svp=config,
        base_arch=arch,
        base_fingerprint=fingerprint,
        num_classes=count_classes(tensors),
        svp_peft_version=library_version(),
        weights_sha256=None,
    )
    return write_folder(out_dir, *encode(info, tensors))


def export_svp_checkpoint(
    path_or_repo: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    *,
    base: nn.Module | Mapping[str, Tensor] | None = None,
) -> Path:
    """Write an adapter as a checkpoint that the released SVP code loads.

    The way back of `convert_svp_checkpoint`: the prompts' and the head's tensors come out bit for
    bit, the 24-row scale included.

    Args:
        path_or_repo: folder or Hub repository of an adapter with `cross_source="released"`.
        checkpoint: the `.pth` file to write.
        base: the base model or its state_dict; its tensors are then in the checkpoint too, as the
            released code expects. None writes the trained tensors alone.

    Returns:
        `checkpoint`.

    Raises:
        InputError: the released code cannot express the adapter.
        BaseModelMismatchError: `base` is of another geometry than the adapter's base model.
        CheckpointError: the file cannot be written.
        Otherwise as `load_adapter` for the adapter's files.
    """
    contents = read_adapter(path_or_repo, HubOptions())
    check_contents(contents)
    config, tensors = contents.info.svp, contents.tensors
    if config.cross_source != "released" or config.inner_bottleneck not in _RELEASED_BOTTLENECKS:
        raise InputError(
            f"{contents.where} has cross_source={config.cross_source!r} and inner_bottleneck="
            f"{config.inner_bottleneck}; the released code computes only 'released' and builds "
            f"only {_RELEASED_BOTTLENECKS}. Keep this adapter in svp_peft's own format."
        )
    state = _released_state(tensors)
    if base is not None:
        own = base.state_dict() if isinstance(base, nn.Module) else base
        plain = {plain_key(key): tensor for key, tensor in own.items()}
        kept = {k: t for k, t in plain.items() if not k.startswith(("svp.", "head."))}
        _check_base(kept, contents)
        state = {key: tensor.detach().cpu() for key, tensor in kept.items()} | state
    args = argparse.Namespace(
        shared_layers=config.cross_group_size,
        prompt_add_gen=f"mlp384*{config.inner_bottleneck}",
        input_relu=config.simam_input,
        nb_classes=contents.info.num_classes,
    )
    target = Path(checkpoint).expanduser()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        torch.save({"model": state, "args": args}, temporary)
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{target} could not be written: {error}. Check the folder, its rights and the space."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _check_base(base: Mapping[str, Tensor], contents: AdapterContents) -> None:
    depth, d_model = contents.tensors["svp.beta"].shape
    found = base_arch(base, [f"layers.{i}" for i in range(depth)], [d_model] * depth, "middle")
    wrong = differences(found, contents.info.base_arch)
    if wrong:
        raise BaseModelMismatchError(
            f"{contents.where} does not fit the base, which has {', '.join(wrong)}. Pass the Vim "
            "that the adapter was trained on, or base=None to write the trained tensors alone."
        )


def _read(path: Path, use_ema: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state_dict, args) of a checkpoint."""
    if path.suffix == ".safetensors":
        return read_checkpoint(path).state, {}
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file. Check the path of the checkpoint.")
    loaded = load_pickle(path)
    args = loaded.get("args")
    known = vars(args) if isinstance(args, argparse.Namespace) else args
    container = "model_ema" if use_ema else "model"
    raw = loaded.get(container, None if use_ema else loaded)
    if not isinstance(raw, Mapping):
        raise CheckpointError(
            f"{path} holds no {container!r}; found {sorted(str(key) for key in loaded)[:12]}. "
            "Pass use_ema=False, or another checkpoint."
        )
    state = {
        str(key).removeprefix("module.").removeprefix("_orig_mod."): value
        for key, value in raw.items()
        if isinstance(value, Tensor)
    }
    return state, dict(known) if isinstance(known, Mapping) else {}


def _adapter_tensors(state: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], int, int]:
    """(tensors by our keys, number of blocks, number of groups)."""
    inner = {m[0]: m for m in map(_INNER.fullmatch, state) if m}
    cross = {m[0]: m for m in map(_CROSS.fullmatch, state) if m}
    missing = [key for key in ("prompt_scale", "prompt_shared_scale") if key not in state]
    if missing or not inner or not cross:
        raise CheckpointError(
            f"{path} is not a checkpoint of the released SVP code: it lacks "
            f"{missing or ['prompt_generator.* or prompt_generator_shared.*']}. It has "
            f"{len(state)} tensors, {sorted(state)[:6]} first. A plain Vim checkpoint is loaded "
            "with load_vim, an svp_peft adapter with load_adapter."
        )
    _check_values(state, [*inner, *cross, "prompt_scale", "prompt_shared_scale"], path)
    # a gap in the numbers shows in the shapes below
    depth = len({m[1] for m in inner.values()})
    groups = len({m[1] for m in cross.values()})
    tensors = {
        f"svp.inner.{m[1]}.{'up' if m[2] == '1' else 'down'}.{m[3]}": state[key]
        for key, m in inner.items()
    }
    tensors |= {f"svp.cross.{m[1]}.{m[2]}": state[key] for key, m in cross.items()}
    tensors |= {key: value for key, value in state.items() if key.startswith("head.")}
    scale = state["prompt_scale"]
    _check_shapes(state, depth, groups, path)
    _check_values(state, [key for key in state if key.startswith("head.")], path)
    tensors["svp.alpha"] = state["prompt_shared_scale"]
    tensors["svp.beta"] = scale[:depth]
    if scale.shape[0] > depth:
        tensors[UNUSED_SCALE_ROWS] = scale[depth:]
    return tensors, depth, groups


def _check_values(state: Mapping[str, Tensor], keys: list[str], path: Path) -> None:
    """Raise `CheckpointError` unless each is a plain tensor of floating-point numbers."""
    wrong = []
    for key in keys:
        tensor = state[key]
        plain = tensor.layout == torch.strided and not tensor.is_meta
        if not plain or tensor.dtype not in _DTYPES or tensor.dim() not in (1, 2):
            place = "" if plain else f" ({tensor.device.type}, {tensor.layout})"
            wrong.append(f"{key} is {tensor.dtype} {tuple(tensor.shape)}{place}")
    if wrong:
        raise CheckpointError(
            f"{path}: {'; '.join(wrong[:6])}. A checkpoint of the released SVP code holds plain "
            "vectors and matrices of floating-point numbers. Take the file that main.py wrote."
        )


def _check_shapes(state: Mapping[str, Tensor], depth: int, groups: int, path: Path) -> None:
    """Raise `CheckpointError` unless the prompts are whole and consistent."""
    if state["prompt_scale"].dim() != 2:
        raise CheckpointError(
            f"{path}: prompt_scale has shape {tuple(state['prompt_scale'].shape)}; the released "
            f"code's has {RELEASED_SCALE_ROWS} rows of d_model. Take the file that main.py wrote."
        )
    first, second = (state.get(f"prompt_generator.0.{i}.weight") for i in (0, 1))
    matrices = first is not None and second is not None and first.dim() == second.dim() == 2
    if first is not None and second is not None and matrices and first.shape[0] != second.shape[1]:
        # RELEASED CODE: models_mamba.py:317-325 builds Linear(D, 32), then Linear(64, D).
        # Pinned by tests/test_convert.py.
        raise CheckpointError(
            f"{path}: its prompt generators narrow to {first.shape[0]} and widen from "
            f"{second.shape[1]}, as prompt_add_gen='mlp384*32' of the released code builds them. "
            "That model fails in its first forward pass, so nothing can have been trained with "
            "it. Use a checkpoint with mlp384*64 or mlp384*128."
        )
    rows, d_model = state["prompt_scale"].shape
    bottleneck = 0 if first is None else first.shape[0]
    wanted: dict[str, tuple[int, ...]] = {"prompt_shared_scale": (groups, d_model)}
    for index in range(depth):
        name = f"prompt_generator.{index}"
        wanted |= {f"{name}.0.weight": (bottleneck, d_model), f"{name}.0.bias": (bottleneck,)}
        wanted |= {f"{name}.1.weight": (d_model, bottleneck), f"{name}.1.bias": (d_model,)}
    for index in range(groups):
        name = f"prompt_generator_shared.{index}.0"
        wanted |= {f"{name}.weight": (d_model, d_model), f"{name}.bias": (d_model,)}
    wrong = [
        f"{key} is {tuple(state[key].shape) if key in state else 'missing'}, expected {shape}"
        for key, shape in wanted.items()
        if key not in state or tuple(state[key].shape) != shape
    ]
    if rows < depth or depth % groups:
        wrong.append(f"{rows} scale rows and {groups} groups for {depth} blocks")
    if wrong:
        raise CheckpointError(
            f"{path}: its prompts are not whole: {'; '.join(wrong[:6])}. The file is cut or mixes "
            "two runs: take another checkpoint of the run."
        )


def _released_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released code's names for an adapter's tensors."""
    state = {key: tensor for key, tensor in tensors.items() if key.startswith("head.")}
    beta, unused = tensors["svp.beta"], tensors.get(UNUSED_SCALE_ROWS)
    if unused is None:
        rows = max(RELEASED_SCALE_ROWS - beta.shape[0], 0)
        unused = beta.new_zeros(rows, beta.shape[1])
    state["prompt_scale"] = torch.cat([beta, unused])
    state["prompt_shared_scale"] = tensors["svp.alpha"]
    for key, tensor in tensors.items():
        kind, *parts = key.removeprefix("svp.").split(".")
        if kind == "inner":
            index, half, leaf = parts
            state[f"prompt_generator.{index}.{0 if half == 'down' else 1}.{leaf}"] = tensor
        elif kind == "cross":
            state[f"prompt_generator_shared.{parts[0]}.0.{parts[1]}"] = tensor
    return state


def _simam(args: Mapping[str, Any], given: bool | None, path: Path) -> bool:
    told = args.get("input_relu")
    told = told if isinstance(told, bool) else None
    if given is not None and not isinstance(given, bool):
        raise InputError(f"simam_input={given!r} must be True, False or None.")
    if told is None and given is None:
        raise InputError(
            f"{path} does not say whether the model was trained with SimAM on its input (option "
            "input_relu of the released code), and the weights do not show it. Pass "
            "simam_input=True or simam_input=False; the released scripts' logs have the option."
        )
    if told is not None and given is not None and told != given:
        raise InputError(
            f"simam_input={given} contradicts {path}, whose args say input_relu={told}. "
            "Leave simam_input out."
        )
    return bool(given if told is None else told)
