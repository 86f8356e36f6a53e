"""Checkpoint files as the official training scripts write them, small ones."""

from __future__ import annotations

import argparse
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svp_peft import VisionMamba

OFFICIAL_GLOBALS = {
    "argparse Namespace",
    "collections OrderedDict",
    "torch FloatStorage",
    "torch._utils _rebuild_tensor_v2",
}
"""All that the pickles of hustvl's repositories refer to."""


def tiny_vim(**arguments: Any) -> VisionMamba:
    """A Vim for 224x224 images that is otherwise as small as can be, in evaluation mode."""
    small = {"depth": 2, "embed_dim": 16, "d_state": 4, "num_classes": 5}
    return VisionMamba(**{**small, **arguments}).eval()


def entry_name(stride: int = 16) -> str:
    size = "" if stride == 16 else f"_stride{stride}"
    return (
        f"vim_small_patch16{size}_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
    )


def write_official(path: Path, model: nn.Module, name: str | None = None) -> Path:
    """A file with everything that hustvl/Vim's main.py saves: optimiser, EMA, arguments."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, foreach=False)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    ema = OrderedDict((key, value + 1.0) for key, value in model.state_dict().items())
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": {"_step_count": 301, "base_lrs": [1e-3]},
            "epoch": 299,
            "model_ema": ema,
            "scaler": {"scale": 65536.0, "growth_factor": 2.0},
            "args": argparse.Namespace(model=name or entry_name(), input_size=224, lr=1e-3),
        },
        path,
    )
    assert globals_of(path) <= OFFICIAL_GLOBALS
    return path


def globals_of(path: Path) -> set[str]:
    """Names that the pickle inside a torch archive would import."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        opcodes = pickletools.genops(archive.read(name))
        return {str(argument) for opcode, argument, _ in opcodes if opcode.name == "GLOBAL"}
