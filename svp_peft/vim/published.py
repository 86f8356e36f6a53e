"""The published models by size."""

from __future__ import annotations

from typing import Any

from svp_peft.errors import InputError
from svp_peft.vim.checkpoint import load_vim
from svp_peft.vim.model import VisionMamba

_LOADING = ("filename", "revision", "token", "cache_dir", "local_files_only")


def vim_tiny(
    pretrained: bool = False, *, num_classes: int | None = None, **options: Any
) -> VisionMamba:
    """Vim-Tiny: depth 24, width 192, 7 million parameters; 76.1% top-1 on ImageNet-1k.

    Args:
        pretrained: load hustvl/Vim-tiny-midclstok; else initialise at random.
        num_classes: classes of the head; None is 1000.
        options: constructor arguments of `VisionMamba`, and with `pretrained` those of `load_vim`.
            filename="vim_t_midclstok_ft_78p3acc.pth" is the stride-8 model with 78.3%.

    Raises:
        CheckpointError, HubError, InputError: see `load_vim`.
    """
    return _published("hustvl/Vim-tiny-midclstok", 192, pretrained, num_classes, options)


def vim_small(
    pretrained: bool = False, *, num_classes: int | None = None, **options: Any
) -> VisionMamba:
    """Vim-Small: depth 24, width 384, 26 million parameters; 80.5% top-1 on ImageNet-1k.

    Args:
        pretrained: load hustvl/Vim-small-midclstok; else initialise at random.
        num_classes: classes of the head; None is 1000.
        options: constructor arguments of `VisionMamba`, and with `pretrained` those of `load_vim`.
            filename="vim_s_midclstok_ft_81p6acc.pth" is the stride-8 model with 81.6%.

    Raises:
        CheckpointError, HubError, InputError: see `load_vim`.
    """
    return _published("hustvl/Vim-small-midclstok", 384, pretrained, num_classes, options)


def vim_base(
    pretrained: bool = False, *, num_classes: int | None = None, **options: Any
) -> VisionMamba:
    """Vim-Base: depth 24, width 768, 98 million parameters; 81.9% top-1 on ImageNet-1k.

    Args:
        pretrained: load hustvl/Vim-base-midclstok; else initialise at random.
        num_classes: classes of the head; None is 1000.
        options: constructor arguments of `VisionMamba`, and with `pretrained` those of `load_vim`.

    Raises:
        CheckpointError, HubError, InputError: see `load_vim`.
    """
    return _published("hustvl/Vim-base-midclstok", 768, pretrained, num_classes, options)


def _published(
    repo_id: str,
    embed_dim: int,
    pretrained: bool,
    num_classes: int | None,
    options: dict[str, Any],
) -> VisionMamba:
    if pretrained:
        return load_vim(repo_id, num_classes=num_classes, **options)
    useless = sorted(options.keys() & set(_LOADING))
    if useless:
        raise InputError(
            f"{useless} say how to load weights, and pretrained=False loads none. Pass "
            f"pretrained=True or leave them out."
        )
    defaults = {"embed_dim": embed_dim, "depth": 24, "final_pool_type": "mean"}
    return VisionMamba(
        **{**defaults, "num_classes": 1000 if num_classes is None else num_classes, **options}
    )
