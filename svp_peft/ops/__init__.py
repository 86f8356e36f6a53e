"""Pure functions on tensors: the scan, the mixer, the norm and the prompt, on any backend.

`backends.py` chooses the implementation, `reference/` holds the formulas, and `cpu/`, `cuda/`,
`triton/` and `mamba_ssm/` hold one implementation each. `frozen_stack` runs many frozen blocks with
their prompts at once, on backends that can.
"""

from svp_peft.ops.backends import BACKENDS, choose, get_backend, set_backend
from svp_peft.ops.mixer_op import mixer
from svp_peft.ops.norm_op import add_norm
from svp_peft.ops.prompt_op import svp_prompt, svp_prompt_released
from svp_peft.ops.scan_op import conv_silu, scan, selective_scan
from svp_peft.ops.stack_op import frozen_stack
from svp_peft.ops.types import Cache, FrozenBlock, MixerWeights, PromptWeights

__all__ = [
    "BACKENDS",
    "Cache",
    "FrozenBlock",
    "MixerWeights",
    "PromptWeights",
    "add_norm",
    "choose",
    "conv_silu",
    "frozen_stack",
    "get_backend",
    "mixer",
    "scan",
    "selective_scan",
    "set_backend",
    "svp_prompt",
    "svp_prompt_released",
]
