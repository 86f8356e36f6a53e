"""What the prompts do to the gates of a Vision Mamba: numbers as tensors, and pictures of them.

    maps = gate_maps(model, images, blocks=[0, 5, 11])
    plot_gate_maps(maps, images).savefig("gates.png")

Numbers: `gate_maps`, `receptive_field`, `scale_profile`, `read_metrics`. Pictures: the functions
that begin with `plot_`; they return matplotlib figures, and matplotlib is imported only when one
of them is called.
"""

from svp_peft.visualize.gates import GateMaps, Gates, gate_maps
from svp_peft.visualize.plots import plot_gate_maps, plot_receptive_field
from svp_peft.visualize.receptive import ReceptiveField, receptive_field
from svp_peft.visualize.scales import ScaleProfile, plot_scales, scale_profile
from svp_peft.visualize.training import plot_training, read_metrics

__all__ = [
    "GateMaps",
    "Gates",
    "ReceptiveField",
    "ScaleProfile",
    "gate_maps",
    "plot_gate_maps",
    "plot_receptive_field",
    "plot_scales",
    "plot_training",
    "read_metrics",
    "receptive_field",
    "scale_profile",
]
