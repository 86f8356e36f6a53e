"""The formulas in plain, differentiable PyTorch, for any device and dtype: ground truth."""

from svp_peft.ops.reference.conv import conv_silu
from svp_peft.ops.reference.mixer import mixer
from svp_peft.ops.reference.norm import add_norm
from svp_peft.ops.reference.prompt import positions_mask, prompt, prompt_released
from svp_peft.ops.reference.scan import scan

__all__ = ["add_norm", "conv_silu", "mixer", "positions_mask", "prompt", "prompt_released", "scan"]
