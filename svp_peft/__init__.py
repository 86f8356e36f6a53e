"""Adapt Vision Mamba models to new tasks by Selective Visual Prompting, without touching them.

model = svp_peft.load_vim("hustvl/Vim-small-midclstok", num_classes=100)
svp_peft.apply_svp(model, svp_peft.SVPConfig())
...                                     # your own training loop
svp_peft.save_adapter(model, "runs/cub")
"""

from svp_peft.adapter_file import hotswap_adapter, load_adapter, save_adapter
from svp_peft.adapters import (
    add_adapter,
    average_adapters,
    delete_adapter,
    disable_adapter,
    get_model_status,
    list_adapters,
    merge_and_unload,
    print_trainable_parameters,
    set_adapter,
)
from svp_peft.backbones import BackboneSpec
from svp_peft.config import SVPConfig
from svp_peft.convert import convert_svp_checkpoint, export_svp_checkpoint
from svp_peft.errors import SVPError
from svp_peft.hub import push_to_hub
from svp_peft.ops import get_backend, set_backend
from svp_peft.patch import apply_svp, remove_svp
from svp_peft.routing import route
from svp_peft.verify import verify_backbone
from svp_peft.vim import VisionMamba, load_vim, vim_base, vim_small, vim_tiny

__version__ = "0.1.0"

__all__ = [
    "BackboneSpec",
    "SVPConfig",
    "SVPError",
    "VisionMamba",
    "add_adapter",
    "apply_svp",
    "average_adapters",
    "convert_svp_checkpoint",
    "delete_adapter",
    "disable_adapter",
    "export_svp_checkpoint",
    "get_backend",
    "get_model_status",
    "hotswap_adapter",
    "list_adapters",
    "load_adapter",
    "load_vim",
    "merge_and_unload",
    "print_trainable_parameters",
    "push_to_hub",
    "remove_svp",
    "route",
    "save_adapter",
    "set_adapter",
    "set_backend",
    "verify_backbone",
    "vim_base",
    "vim_small",
    "vim_tiny",
]
