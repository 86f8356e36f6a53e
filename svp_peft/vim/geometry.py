"""The constructor arguments of a VisionMamba, read from the tensors of its state_dict."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from svp_peft.errors import CheckpointError, InputError
from svp_peft.vim.arguments import pair
from svp_peft.vim.embedding import grid_of

DEFAULT_IMAGE = (224, 224)
"""Image size of the published models, assumed where tensors allow it and nothing is said."""


def arguments_of(build: Callable[..., Any]) -> frozenset[str]:
    """Names of the constructor arguments of a class."""
    return frozenset(inspect.signature(build).parameters)


def complete_arguments(
    build: Callable[..., Any],
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    entry_name: str | None,
    source: str,
    target_image: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Constructor arguments of the model that `state` was saved from.

    What shapes determine comes from the tensors. The rest comes from `config`, then from the name
    of the official model function, then from the published models: one class token is a middle
    one, "v2" halves the sum of its directions, tokens are averaged where there is no class token,
    and the image is 224x224.

    The stride comes from the number of positions: patch_size or a half, a quarter, ... of it, at
    224x224 or else at `target_image`; where none fits, patches are assumed not to overlap and the
    image to be square.

    Args:
        build: the class whose constructor takes them.
        state: tensors by hustvl/Vim's names.
        config: constructor arguments that are known; others are ignored.
        entry_name: for example "vim_small_patch16_stride8_224_bimambav2_..._midclstok_div2".
        source: name of the file, for messages.
        target_image: (height, width) that the caller is going to use.

    Raises:
        CheckpointError: `state` is not a Vim's, or `config` contradicts it.
        InputError: a value in `config` cannot work.
    """
    stated = _stated(config, arguments_of(build) - {"device", "dtype"})
    shapes = _from_shapes(state, source)
    for name, found in shapes.items():
        given = stated.get(name, found)
        if name == "patch_size":
            given = pair(given, name)
        if name not in ("num_classes", "ssm_cfg", "init_layer_scale") and given != found:
            raise CheckpointError(
                f"{source}: the config says {name}={given!r}, but the tensors have {found!r}. "
                f"Correct the config, or leave {name} out of it."
            )
    soft = {
        "use_middle_cls_token": True,
        "if_divide_out": True,
        "if_rope_residual": False,
        "final_pool_type": "mean",
    }
    arguments = {**soft, **_from_entry_name(entry_name), **stated, **shapes}
    image, stride = (
        None if stated.get(name) is None else pair(stated[name], name)
        for name in ("img_size", "stride")
    )
    patches = _num_patches(state, arguments, source)
    arguments["img_size"], arguments["stride"] = _image_and_stride(
        patches, shapes["patch_size"], image, stride, target_image, source
    )
    return arguments


def _stated(config: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """`config` with one spelling per argument, and without what is not one."""
    stated = {k: v for k, v in config.items() if k in known}
    old_spelling = stated.pop("if_devide_out", None)
    if stated.get("if_divide_out") is None:
        stated.pop("if_divide_out", None)
        if old_spelling is not None:
            stated["if_divide_out"] = old_spelling
    if stated.pop("if_bimamba", False):
        stated["bimamba_type"] = "v1"
    ssm_cfg = stated.get("ssm_cfg") or {}
    if not isinstance(ssm_cfg, Mapping):
        raise InputError(
            f"ssm_cfg={ssm_cfg!r} holds no arguments of the mixer. Pass a dict such as "
            f"{{'d_state': 16}}, or leave it out."
        )
    if ssm_cfg.get("d_state") is not None:
        stated["d_state"] = ssm_cfg["d_state"]
    return stated


def _from_shapes(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The arguments that follow from the tensors alone."""
    _refuse_other_families(state, source)

    def dimensions(name: str, count: int) -> tuple[int, ...]:
        return _dimensions(state, name, count, source)

    embed_dim, channels, *patch = dimensions("patch_embed.proj.weight", 4)
    mixer = "layers.0.mixer."
    d_inner, d_state = dimensions(mixer + "A_log", 2)
    dt_rank = dimensions(mixer + "dt_proj.weight", 2)[1]
    d_conv = dimensions(mixer + "conv1d.weight", 3)[2]
    has = state.__contains__
    if has(mixer + "conv1d_b.weight"):
        bimamba_type = "v2"
    else:
        bimamba_type = "v1" if has(mixer + "A_b_log") else "none"
    double = has("cls_token_head")
    return {
        "depth": _depth(state, source),
        "embed_dim": embed_dim,
        "channels": channels,
        "patch_size": (patch[0], patch[1]),
        "d_state": d_state,
        "num_classes": dimensions("head.weight", 2)[0] if has("head.weight") else 0,
        "bimamba_type": bimamba_type,
        "if_cls_token": double or has("cls_token"),
        "use_double_cls_token": double,
        "if_abs_pos_embed": has("pos_embed"),
        "if_rope": has("rope.freqs_cos"),
        "rms_norm": not has("norm_f.bias"),
        "init_layer_scale": 1.0 if has(mixer + "gamma") else None,
        "ssm_cfg": {
            "d_conv": d_conv,
            "expand": _expansion(d_inner, embed_dim),
            "dt_rank": dt_rank,
            "conv_bias": has(mixer + "conv1d.bias"),
            "bias": has(mixer + "in_proj.bias"),
        },
    }


def _refuse_other_families(state: Mapping[str, Tensor], source: str) -> None:
    if any(name.startswith(("prompt_scale", "prompt_generator")) for name in state):
        raise CheckpointError(
            f"{source} is a checkpoint of the released SVP code: a whole model with its prompts. "
            f"Turn it into an adapter with svp_peft.convert_svp_checkpoint, and load the backbone "
            f"it was trained on with load_vim."
        )
    if any(name.startswith("svp.") for name in state):
        raise CheckpointError(
            f"{source} is an SVP adapter, not a backbone. Load the backbone with load_vim and the "
            f"adapter with svp_peft.load_adapter(model, ...)."
        )


def _dimensions(state: Mapping[str, Tensor], name: str, count: int, source: str) -> tuple[int, ...]:
    """The shape of a tensor that every such Vim has, of `count` axes."""
    if name not in state:
        raise CheckpointError(
            f"{source} has no tensor {name!r}, so it is not a Vim's state_dict; it has "
            f"{len(state)} tensors, {sorted(state)[:6]} among them. Load a checkpoint of "
            f"hustvl/Vim, or pick the right file with filename=."
        )
    shape = tuple(state[name].shape)
    if len(shape) != count or 0 in shape:
        raise CheckpointError(
            f"{source}: {name} has shape {shape}, but a Vim's has {count} axes and none of length "
            f"0. The file is of another kind of model, or damaged."
        )
    return shape


def _depth(state: Mapping[str, Tensor], source: str) -> int:
    matches = (re.match(r"layers\.(\d+)\.", name) for name in state)
    found = {int(match[1]) for match in matches if match}
    absent = [index for index in range(len(found)) if index not in found]
    if absent:
        raise CheckpointError(
            f"{source} has tensors of {len(found)} blocks, up to layers.{max(found)}, and none of "
            f"layers.{absent[0]}. It is incomplete, or of another kind of model; get it again."
        )
    return len(found)


def _expansion(d_inner: int, embed_dim: int) -> float:
    """The factor of which a mixer makes `d_inner`, by rounding down, again."""
    expand = d_inner / embed_dim
    return expand if int(expand * embed_dim) == d_inner else math.nextafter(expand, math.inf)


def _from_entry_name(name: str | None) -> dict[str, Any]:
    """What hustvl/Vim's model names say and tensors do not."""
    if name is None or not name.startswith("vim_") or "bimamba" not in name:
        return {}
    said: dict[str, Any] = {
        "if_divide_out": "div2" in name,
        "use_middle_cls_token": "midclstok" in name or "middle_cls_token" in name,
        "if_rope_residual": "rope_also_residual" in name,
    }
    pool = re.search(r"final_pool_(none|mean|max|all)", name)
    return {**said, "final_pool_type": pool[1]} if pool else said


def _num_patches(
    state: Mapping[str, Tensor], arguments: Mapping[str, Any], source: str
) -> int | None:
    """Patches per image, or None where no tensor tells."""
    if "pos_embed" in state:
        tokens = (2 if arguments["use_double_cls_token"] else 1) * arguments["if_cls_token"]
        positions = _dimensions(state, "pos_embed", 3, source)[1]
        if positions <= tokens:
            raise CheckpointError(
                f"{source} has {positions} position embeddings, which its {tokens} class tokens "
                f"use up: none is left for a patch. The file is damaged; get it again."
            )
        return positions - tokens
    if "rope.freqs_cos" in state:
        return _dimensions(state, "rope.freqs_cos", 2, source)[0]
    return None


def _image_and_stride(
    patches: int | None,
    patch: tuple[int, int],
    image: tuple[int, int] | None,
    stride: tuple[int, int] | None,
    target: tuple[int, int] | None,
    source: str,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Image size and stride that give `patches` patches."""
    if patches is None:
        return image or target or DEFAULT_IMAGE, stride or patch
    halvings = [s for k in range(8) if (s := patch[0] >> k) and s << k == patch[0]]
    strides = [stride] if stride else [patch, *((s, s) for s in halvings if (s, s) != patch)]
    images = [image] if image else [DEFAULT_IMAGE, *([target] if target else [])]
    for size in images:
        for step in strides:
            rows, columns = grid_of(size, patch, step)
            if rows > 0 and rows * columns == patches:
                return size, step
    side = math.isqrt(patches)
    if image is None and side * side == patches:
        height, width = ((side - 1) * s + p for p, s in zip(patch, strides[0], strict=True))
        return (height, width), strides[0]
    said = f"an image of {image[0]}x{image[1]}" if image else "a square image"
    raise CheckpointError(
        f"{source} has position embeddings for {patches} patches, which {said} cut into patches of "
        f"{patch[0]}x{patch[1]} does not give. Say what the model was trained with: put img_size "
        f"and stride into its config, or pass base_img_size=(height, width) and stride= to "
        f"load_vim."
    )
