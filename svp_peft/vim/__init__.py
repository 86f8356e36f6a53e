"""The built-in Vision Mamba backbone and its checkpoints."""

from svp_peft.vim.checkpoint import load_vim
from svp_peft.vim.model import VisionMamba
from svp_peft.vim.published import vim_base, vim_small, vim_tiny

__all__ = ["VisionMamba", "load_vim", "vim_base", "vim_small", "vim_tiny"]
