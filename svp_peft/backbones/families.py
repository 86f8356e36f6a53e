"""One record per model family, found by structure and never by importing its package.

A record looks at one module and returns a `BackboneSpec` if the module has that family's blocks
and attributes, else None. Line numbers refer to the sources as they were read.

    family        blocks at                  a block takes and returns           class tokens
    vim           layers[i]                  (hidden, residual) -> both          any kind or none
    released_svp  layers[i]                  as vim                              middle
    videomamba    layers[i]                  as vim                              head
    mamba_reg     layers[i]                  as vim                              registers
    local_vim     layers[i]                  as vim                              none or middle
    mixer_model   layers[i]                  as vim                              none
    arm           layers[i]                  hidden -> hidden                    middle
    plain_mamba   layers[i]                  (x, hw_shape) -> x                  none
    vmamba        layers[i].blocks[j]        x -> x, (batch, H, W, d_model) or   none
                                             channels first
    mambavision   levels[i].blocks[j]        windows -> windows                  none

In the first six a block sees the previous mixer's output and adds it to the residual stream
itself; in the others it sees the whole stream, so that there the prompts are made from that: an
extension beyond the paper.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from svp_peft.backbones.spec import BackboneSpec, ClassTokens
from svp_peft.errors import BackboneNotSupportedError


def _vim(path: str, module: nn.Module) -> BackboneSpec | None:
    """hustvl/Vim and all that share its blocks: forward(hidden_states, residual=None, ...).

    Source: hustvl/Vim at dd0358a, vim/models_mamba.py lines 66-139 and 392-501; its segmentation
    and detection backbones; sony/MambaPEFT at 87f21ec; OpenGVLab/VideoMamba at f3427e4;
    wangf3014/Mamba-Reg at 0f7c2da; hunto/LocalMamba at 75e5d1f, local_vim.py;
    state-spaces/mamba 2.3.2, mixer_seq_simple.py.
    """
    blocks = _blocks(module, "layers", "mixer", "norm")
    if blocks is None:
        return None
    reversed_blocks: tuple[int, ...] = ()
    if getattr(module, "if_bidirectional", False) and not hasattr(module, "transfer_type"):
        # hustvl/Vim runs pairs of blocks; the second one of each sees the tokens in reverse
        reversed_blocks = tuple(range(1, len(blocks), 2))
    family, class_tokens = _vim_class_tokens(path, module)
    return BackboneSpec(
        blocks=join(path, "layers"),
        class_tokens=class_tokens,
        reversed_blocks=reversed_blocks,
        head=join(path, "head"),
        owner=path,
        family=family,
    )


def _vim_class_tokens(path: str, module: nn.Module) -> tuple[str, ClassTokens]:
    """(family, class tokens). A class token exists if and only if its parameter does: the
    segmentation and detection backbones delete the parameter and leave the flag on."""
    positions = getattr(module, "cls_positions", None)
    if isinstance(positions, (Tensor, list, tuple)):
        return "mamba_reg", tuple(int(p) for p in positions)
    local = hasattr(module.get_submodule("layers.0.mixer"), "multi_scan")
    family = "local_vim" if local else "vim"
    if isinstance(getattr(module, "embedding", None), nn.Embedding):
        family = "mixer_model"
    tokens: ClassTokens = "none"
    if getattr(module, "cls_token_head", None) is not None:
        tokens = "double"
    elif getattr(module, "cls_token", None) is not None:
        # the released SVP model has no flag and always puts it in the middle; VideoMamba has
        # neither flag nor choice and always puts it first
        if hasattr(module, "transfer_type"):
            return "released_svp", "middle"
        if not hasattr(module, "if_cls_token"):
            return "videomamba", "head"
        tokens = "middle" if getattr(module, "use_middle_cls_token", False) else "head"
    if getattr(module, "prompt_encoder", None) is not None and tokens != "none":
        raise BackboneNotSupportedError(
            f"the Vim at {path or 'the top'!r} inserts prompt tokens of its own "
            f"(prompt_type={getattr(module, 'prompt_type', None)!r}, as MambaPEFT does), which "
            "moves the class token: SVP would prompt it. Say where it stands: "
            f"backbone=BackboneSpec(blocks={join(path, 'layers')!r}, class_tokens=(position,), "
            f"owner={path!r})."
        )
    return family, tokens


def _arm(path: str, module: nn.Module) -> BackboneSpec | None:
    """ARM: Vim's signature, but a block returns the whole stream as one tensor.

    Source: OliverRensu/ARM at 996d93e, Finetuning/models_mamba.py lines 82-112 and 362-381. It
    puts the class token in the middle whatever `use_middle_cls_token` says; the pretraining model
    has none.
    """
    blocks = _blocks(module, "layers", "mixer", "norm1", "norm2")
    if blocks is None:
        return None
    return BackboneSpec(
        blocks=join(path, "layers"),
        class_tokens="none" if getattr(module, "cls_token", None) is None else "middle",
        head=join(path, "head"),
        owner=path,
        family="arm",
    )


def _plain_mamba(path: str, module: nn.Module) -> BackboneSpec | None:
    """PlainMamba: layer(x, hw_shape=...) -> x, tokens in a plain row.

    Source: ChenhongyiYang/PlainMamba at 0975a1d, plain_mamba_layer.py and plain_mamba.py.
    """
    if _blocks(module, "layers", "mamba", "norm") is None:
        return None
    return BackboneSpec(
        blocks=join(path, "layers"),
        head=join(path, "head"),
        input_name="x",
        owner=path,
        family="plain_mamba",
    )


def _vmamba(path: str, module: nn.Module) -> BackboneSpec | None:
    """VMamba, LocalVMamba and EfficientVMamba: stages of blocks that see feature maps.

    Stages without SSM blocks (the convolutions of EfficientVMamba) are left alone.

    Source: MzeroMiko/VMamba at 2ed52ea, vmamba.py lines 1153-1281; hunto/LocalMamba at 75e5d1f,
    local_vmamba.py; TerryPei/EfficientVMamba at 0bc5ee2, vmamba_efficient.py lines 1211-1236.
    """
    blocks = _stages(path, module, "layers", "op")
    if blocks is None:
        return None
    first = getattr(module, "channel_first", False)
    return BackboneSpec(
        blocks=blocks,
        head=join(path, "classifier.head"),
        input_name="input",
        layout="channels_first" if first else "channels_last",
        owner=path,
        family="vmamba",
    )


def _mambavision(path: str, module: nn.Module) -> BackboneSpec | None:
    """MambaVision: stages of convolutions, then stages of blocks that see windows of tokens.

    Attention blocks are prompted like Mamba blocks; `SVPConfig(layers=...)` chooses. Tokens that
    pad an incomplete window get prompts too, and are cut off after the stage.

    Source: NVlabs/MambaVision at 7860a50, mamba_vision.py lines 94-107, 482-529 and 606-613.
    """
    blocks = _stages(path, module, "levels", "mixer")
    if blocks is None:
        return None
    return BackboneSpec(
        blocks=blocks,
        head=join(path, "head"),
        input_name="x",
        owner=path,
        family="mambavision",
    )


FAMILIES: tuple[Callable[[str, nn.Module], BackboneSpec | None], ...] = (
    _vim,
    _arm,
    _plain_mamba,
    _vmamba,
    _mambavision,
)


def join(*parts: str) -> str:
    """Dotted path of the parts that are not empty."""
    return ".".join(part for part in parts if part)


def _blocks(module: nn.Module, name: str, *attributes: str) -> list[nn.Module] | None:
    """The modules of the list `name` of `module` if it has any and all have `attributes`."""
    stack = module._modules.get(name)
    if not isinstance(stack, (nn.ModuleList, nn.Sequential)) or len(stack) == 0:
        return None
    blocks = list(stack)
    for block in blocks:
        if any(_inside(block)._modules.get(attribute) is None for attribute in attributes):
            return None
    return blocks


def _inside(block: nn.Module) -> nn.Module:
    """The block itself, where PyTorch's activation checkpointing is wrapped around it."""
    return block._modules.get("_checkpoint_wrapped_module") or block


def _stages(path: str, module: nn.Module, name: str, attribute: str) -> tuple[str, ...] | None:
    """Paths of the blocks that have `attribute`, in all stages of the list `name`."""
    stages = module._modules.get(name)
    if not isinstance(stages, (nn.ModuleList, nn.Sequential)):
        return None
    paths: list[str] = []
    for stage_name, stage in stages._modules.items():
        blocks = None if stage is None else stage._modules.get("blocks")
        if not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
            continue
        for block_name, block in blocks._modules.items():
            if block is not None and _inside(block)._modules.get(attribute) is not None:
                paths.append(join(path, name, stage_name, "blocks", block_name))
    return tuple(paths) or None
