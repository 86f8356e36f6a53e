"""The built-in Vision Mamba backbone and its checkpoints."""

from svp_peft.vim.model import VisionMamba

__all__ = ["VisionMamba"]
