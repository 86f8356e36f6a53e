"""Serving several tasks at once: one mixed batch against one pass per task.

    python examples/benchmarks/serving.py [--device cuda] [--dtype bfloat16] [--output FILE.json]

A Vim-Small with eight adapters, each with a head of another number of classes, answers a batch of
64 images, eight for each adapter: in one pass through `route`, in eight passes of eight with
`set_adapter`, and, for comparison, with one adapter for all and without prompts. Weights are
random: the time does not depend on them.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import svp_peft as sp

ADAPTERS = 8
IMAGES = 64


def build(device: torch.device, depth: int) -> tuple[torch.nn.Module, list[str]]:
    """Vim-Small and the names of its adapters, whose scales are random as after training."""
    torch.manual_seed(0)
    model = sp.VisionMamba(
        img_size=224,
        patch_size=16,
        stride=16,
        embed_dim=384,
        depth=depth,
        num_classes=1000,
        rms_norm=True,
        residual_in_fp32=True,
        fused_add_norm=True,
        final_pool_type="mean",
        if_abs_pos_embed=True,
        bimamba_type="v2",
        if_cls_token=True,
        if_divide_out=True,
        use_middle_cls_token=True,
    )
    names = [f"task{index}" for index in range(ADAPTERS)]
    sp.apply_svp(model, sp.SVPConfig(), adapter_name=names[0])
    for index, name in enumerate(names[1:], 1):
        sp.add_adapter(model, name, num_classes=100 + index)
    with torch.no_grad():
        for name in names:
            for scale in (model.svp.adapters[name].alpha, model.svp.adapters[name].beta):
                scale.normal_(std=0.1)
    return model.eval().to(device), names


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Time of each of `repeats` runs, after two to warm up."""
    times = []
    for index in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index >= 2:
            times.append((time.perf_counter() - start) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=0, help="0: 20 on a GPU, 3 on a CPU")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    repeats = arguments.repeats or (20 if device.type == "cuda" else 3)
    model, names = build(device, arguments.depth)
    images = torch.randn(IMAGES, 3, 224, 224, device=device)
    mixed = [names[index % ADAPTERS] for index in range(IMAGES)]

    def one_mixed_batch() -> torch.Tensor:
        with sp.route(model, mixed):
            return model(images)

    def one_sorted_batch() -> torch.Tensor:
        with sp.route(model, sorted(mixed)):
            return model(images)

    def a_pass_per_task() -> list[torch.Tensor]:
        outputs = []
        for index, name in enumerate(names):
            sp.set_adapter(model, name)
            outputs.append(model(images[index::ADAPTERS]))
        return outputs

    def one_adapter() -> torch.Tensor:
        return model(images)

    def no_prompts() -> torch.Tensor:
        with sp.disable_adapter(model):
            return model(images)

    cases = {
        "64 images, 8 adapters mixed, one pass": one_mixed_batch,
        "64 images, 8 adapters sorted, one pass": one_sorted_batch,
        "8 images each, 8 adapters, eight passes": a_pass_per_task,
        "64 images, one adapter": one_adapter,
        "64 images, no prompts": no_prompts,
    }
    dtype = getattr(torch, arguments.dtype)
    result = {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": arguments.dtype,
        "depth": arguments.depth,
        "cases": {},
    }
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        alone = torch.cat([logits[:, :100] for logits in a_pass_per_task()])
        order = [i for first in range(ADAPTERS) for i in range(first, IMAGES, ADAPTERS)]
        difference = (one_mixed_batch()[order, :100] - alone).abs().max() / alone.abs().max()
        result["largest relative difference of mixed and separate"] = float(difference)
        print(f"largest relative difference of mixed and separate: {float(difference):.1e}")
        for name, run in cases.items():
            times = milliseconds(run, device, repeats)
            result["cases"][name] = {"median ms": statistics.median(times), "best ms": min(times)}
            print(f"{name:42s} {statistics.median(times):9.1f} ms (best {min(times):.1f})")
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
