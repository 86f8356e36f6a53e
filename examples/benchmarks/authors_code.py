"""The authors' released code, timed by gpu.py in a process of its own.

    python examples/benchmarks/authors_code.py FOLDER OUTPUT.json

FOLDER holds a copy of zhoujiahuan1991/AAAI2025-SVP: `svp/model` and, as `fork_svp/mamba_ssm`, its
fork of mamba-ssm. Nothing of it is part of this project. The compiled kernels are those of stock
mamba-ssm and causal-conv1d; what is changed here is the order of arguments that newer releases of
causal-conv1d expect, and modules for text generation that the fork imports and never uses.
"""

import json
import sys
import types
from pathlib import Path
from typing import Any

import torch


def adapt_imports(folder: Path) -> None:
    """Make the fork importable beside today's causal-conv1d and timm."""
    sys.path[:0] = [str(folder / "fork_svp"), str(folder / "svp")]
    from causal_conv1d.cpp_functions import (
        causal_conv1d_bwd_function,
        causal_conv1d_fwd_function,
    )

    def forward(x: Any, weight: Any, bias: Any, seq_idx: Any, *rest: Any) -> Any:
        return causal_conv1d_fwd_function(x, weight, bias, seq_idx, None, None, rest[-1])

    def backward(x: Any, weight: Any, bias: Any, dout: Any, seq_idx: Any, *rest: Any) -> Any:
        old = len(rest) == 2
        dx = rest[0] if old else rest[2]
        found = causal_conv1d_bwd_function(
            x, weight, bias, dout, seq_idx, None, None, dx, False, rest[-1]
        )
        return tuple(found[:3]) if old else tuple(found)

    def module(name: str, **attributes: Any) -> None:
        stand_in = types.ModuleType(name)
        vars(stand_in).update(attributes)
        sys.modules[name] = stand_in

    module("causal_conv1d_cuda", causal_conv1d_fwd=forward, causal_conv1d_bwd=backward)
    module("mamba_ssm.utils.generation", GenerationMixin=object)
    module("mamba_ssm.utils.hf", load_config_hf=None, load_state_dict_hf=None)
    module("mamba_ssm.models.mixer_seq_simple", MambaLMHeadModel=object)
    import timm.models.vision_transformer as vision_transformer

    if not hasattr(vision_transformer, "_load_weights"):
        vision_transformer._load_weights = None


def build(everything: bool) -> torch.nn.Module:
    """Their Vim-Small with SVP; `everything` makes all parameters trainable."""
    from model.models_mamba import VisionMamba

    torch.manual_seed(0)
    model = VisionMamba(
        patch_size=16,
        embed_dim=384,
        depth=24,
        rms_norm=True,
        residual_in_fp32=True,
        fused_add_norm=True,
        if_abs_pos_embed=True,
        bimamba_type="v2",
        if_devide_out=True,
        num_classes=100,
        drop_path_rate=0.1,
        transfer_type="prompt",
        prompt_type="addv4",
        prompt_add_gen="mlp384*64",
        shared_layers=8,
        dataset="CIFAR",
    ).cuda()
    with torch.no_grad():
        model.prompt_scale.normal_(0, 0.1)
        model.prompt_shared_scale.normal_(0, 0.1)
    if everything:
        model.requires_grad_(True)
    return model


def main() -> None:
    folder, output = Path(sys.argv[1]), Path(sys.argv[2])
    adapt_imports(folder)
    from gpu import PRECISIONS, measure, precision, steps

    results = []
    for everything in (False, True):
        model = build(everything)
        for name in PRECISIONS if not everything else ("tf32", "bf16"):
            for batch in (96,) if everything else (96, 8, 1) if name == "bf16" else (96, 8):
                with precision(name) as context:
                    train, infer = steps(model, batch, 224, context, lambda out: out[0])
                    for kind, run in (("training", train), ("inference", infer)):
                        # their in-place prompts cannot train at batch 1
                        cannot = kind == "training" and batch == 1
                        if cannot or (everything and kind == "inference"):
                            continue
                        model.train(kind == "training")
                        row = {
                            "path": "authors' code",
                            "model": "Vim-Small",
                            "kind": "full fine-tuning" if everything else kind,
                            "batch": batch,
                            "precision": name,
                            "mode": "eager",
                            **measure(run, batch, repeats=20),
                        }
                        results.append(row)
                        print(json.dumps(row), flush=True)
        del model
        torch.cuda.empty_cache()
    output.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
