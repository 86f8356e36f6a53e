"""What a Vision Mamba costs on a CPU: the C++ kernels, the reference, and the alternatives.

    python examples/benchmarks/cpu.py [--threads 2] [--repeats 7] [--output runs/benchmarks/cpu]
    python examples/benchmarks/cpu.py --quick        a minute; a small model, to see that it runs

One run prints the table of docs/performance.md and writes cpu.json, cpu.md and cpu.png. Times are
medians with their quartiles; what is compared is measured in turns, so that a busy machine slows
both. Vim-Small, float32, random weights: the time does not depend on them. On a machine that other
programs share, `--threads 1 --clock cpu` counts the processor time of this program alone.

Two other packages are measured on the same shapes where they are installed, as what one would
otherwise use on a CPU: `pip install mambapy transformers`.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import svp_peft as sp
from svp_peft.ops import cpu
from svp_peft.vim.mixer import VimMixer

Run = Callable[[], object]
BATCH = 8
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
NANO = Path(__file__).parents[1] / "assets" / "vim_nano_tin"


def vim(width: int = 384, depth: int = 24, pixels: int = 224) -> nn.Module:
    """A Vim of hustvl/Vim's published kind, random weights."""
    torch.manual_seed(0)
    return sp.VisionMamba(
        img_size=pixels,
        patch_size=16,
        embed_dim=width,
        depth=depth,
        num_classes=100,
        rms_norm=True,
        residual_in_fp32=True,
        fused_add_norm=True,
        final_pool_type="mean",
        if_abs_pos_embed=True,
        bimamba_type="v2",
        if_cls_token=True,
        if_divide_out=True,
        use_middle_cls_token=True,
    ).eval()


def prompted(model: nn.Module) -> nn.Module:
    """`model` with SVP, its scales away from zero as after training."""
    sp.apply_svp(model, sp.SVPConfig(cross_group_size=8, inner_bottleneck=64))
    for scale in (model.svp.alpha, model.svp.beta):
        nn.init.normal_(scale, std=0.02)
    return model


def images(batch: int, pixels: int = 224) -> torch.Tensor:
    return torch.randn(batch, 3, pixels, pixels)


def inference(model: nn.Module, x: torch.Tensor) -> Run:
    def run() -> None:
        with torch.inference_mode():
            model(x)

    return run


def training_step(model: nn.Module, x: torch.Tensor) -> Run:
    """Forward, cross entropy, backward and AdamW on the prompters and the head."""
    labels = torch.randint(0, 100, (x.shape[0],))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return run


def bare_products(width: int, depth: int, batch: int, tokens: int) -> Run:
    """Every matrix product of the forward pass without prompts, and nothing else."""
    rows, inner, rank = batch * tokens, 2 * width, -(-width // 16)
    shapes = [(width, 2 * inner)] + [(inner, rank + 32), (rank, inner)] * 2 + [(inner, width)]
    pairs = [(torch.randn(rows, i), torch.randn(o, i)) for i, o in shapes]
    patches = torch.randn(rows - batch, 768), torch.randn(width, 768)

    def run() -> None:
        torch.mm(patches[0], patches[1].T)
        for _ in range(depth):
            for x, weight in pairs:
                torch.mm(x, weight.T)

    return run


def in_turns(
    runs: dict[str, Run], repeats: int, clock: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Milliseconds of each, one call after the other, `repeats` times round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            started = clock()
            run()
            if turn > 0:  # the first warms up
                seconds[name].append(clock() - started)
    return {name: spread(times) for name, times in seconds.items()}


def spread(seconds: list[float]) -> dict[str, float]:
    ms = sorted(1e3 * s for s in seconds)
    low, median, high = statistics.quantiles(ms, method="inclusive") if len(ms) > 1 else ms * 3
    return {"median": median, "q1": low, "q3": high, "best": ms[0]}


def with_reference(run: Run) -> Run:
    def slowly() -> None:
        sp.set_backend("reference")
        try:
            run()
        finally:
            sp.set_backend("auto")

    return slowly


def mixers(width: int) -> dict[str, nn.Module | str]:
    """One unidirectional mixer of each package with the same weights, or why there is none."""
    ours = VimMixer(width)
    found: dict[str, nn.Module | str] = {"svp_peft": ours}
    makers = {
        "mambapy": ("mambapy.mamba", "MambaBlock", {"d_model": width, "n_layers": 1}),
        "transformers": ("transformers.models.mamba.modeling_mamba", "MambaMixer", None),
    }
    for name, (module, kind, options) in makers.items():
        try:
            library = import_module(module)
        except ImportError:
            found[name] = f"not installed (pip install {name})"
            continue
        if options is None:
            config = library.MambaConfig(hidden_size=width, use_bias=False, use_conv_bias=True)
            peer = library.MambaMixer(config, layer_idx=0)
        else:
            peer = getattr(library, kind)(library.MambaConfig(**options))
        peer.load_state_dict(ours.state_dict())
        x = torch.randn(1, 9, width)
        torch.testing.assert_close(peer.eval()(x), ours(x), rtol=1e-3, atol=1e-5)
        found[name] = peer
    return found


def mixer_runs(mixer: nn.Module, x: torch.Tensor) -> tuple[Run, Run]:
    """Forward, and forward with the gradients of the input and of every weight."""
    leaf = x.clone().requires_grad_()

    def both() -> None:
        mixer(leaf).sum().backward()

    return inference(mixer, x), both


def peak_memory(width: int, depth: int, threads: int) -> float:
    """GiB that a process of its own takes for two training steps, PyTorch included."""
    command = [sys.executable, __file__, "--memory-of", str(width), str(depth)]
    done = subprocess.run(
        [*command, "--threads", str(threads)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def report_memory(width: int, depth: int) -> None:
    step = training_step(prompted(vim(width, depth)), images(BATCH))
    step()
    step()
    try:
        # Linux hands a parent's ru_maxrss on to its children, but not this
        status = Path("/proc/self/status").read_text()
        peak = int(next(x for x in status.splitlines() if x.startswith("VmHWM")).split()[1]) << 10
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak <<= 0 if sys.platform == "darwin" else 10
    print(peak / 2**30)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    width, depth = (64, 4) if options.quick else (384, 24)
    repeats, clock = options.repeats, CLOCKS[options.clock]
    result: dict[str, Any] = {"ms": {}, "model": {"width": width, "depth": depth}}
    ms = result["ms"]

    def note(runs: dict[str, Run], repeats: int) -> None:
        found = in_turns(runs, repeats, clock)
        ms.update(found)
        for name, times in found.items():
            print(f"{name:46} {times['median']:10.2f} ms", flush=True)

    x = images(BATCH)
    plain, adapted = vim(width, depth), prompted(vim(width, depth))
    step = training_step(adapted, x)
    note(
        {
            "bare matrix products": bare_products(width, depth, BATCH, 197),
            "inference": inference(plain, x),
            "inference with SVP": inference(adapted, x),
            "training step with SVP": step,
        },
        repeats,
    )
    note({"inference, batch 1": inference(plain, images(1))}, 2 * repeats)

    sizes = (64, 128) if options.quick else (224, 448, 896)
    for pixels in sizes:
        model, one = prompted(vim(width, depth, pixels)), images(1, pixels)
        tokens = (pixels // 16) ** 2 + 1
        names = f"inference, {tokens} tokens", f"training step, {tokens} tokens"
        runs = dict(zip(names, (inference(model, one), training_step(model, one)), strict=True))
        note(runs, repeats if pixels < 896 else max(2, repeats // 2))
    result["tokens"] = [(pixels // 16) ** 2 + 1 for pixels in sizes]

    nano = sp.load_vim(str(NANO), num_classes=10).eval()
    note({"nano Vim, batch 32": inference(nano, images(32, 64))}, 2 * repeats)

    one = torch.randn(BATCH, 197, width)
    result["peers"] = {}
    ready = {}
    for name, mixer in mixers(width).items():
        if isinstance(mixer, str):
            result["peers"][name] = mixer
            print(f"{name}: {mixer}")
            continue
        result["peers"][name] = metadata.version(name)
        forward, both = mixer_runs(mixer, one)
        ready |= {f"mixer forward, {name}": forward, f"mixer forward and backward, {name}": both}
    note(ready, max(2, repeats // 2))

    # minutes a step: once, without warming up
    started = clock()
    with_reference(step)()
    ms["training step with SVP, reference"] = spread([clock() - started])
    result["peak_gib"] = peak_memory(width, depth, options.threads)
    result["environment"] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": options.threads,
        "clock": options.clock,
        "load": os.getloadavg(),
    }
    return result


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(result: dict[str, Any]) -> str:
    """The rows of docs/performance.md, in Markdown."""
    ms = {name: times["median"] for name, times in result["ms"].items()}
    forward, step = ms["inference with SVP"], ms["training step with SVP"]
    tokens = result["tokens"]

    def row(name: str, remark: str = "") -> tuple[str, str, str]:
        times = result["ms"][name]
        return name, f"{times['median']:,.1f} ({times['q1']:,.1f} to {times['q3']:,.1f})", remark

    def images_per_second(name: str, batch: int) -> str:
        return f"{1e3 * batch / ms[name]:,.1f} img/s"

    rows = [
        row("bare matrix products"),
        row(
            "inference",
            f"{ms['inference'] / ms['bare matrix products']:.2f} times the bare products; "
            + images_per_second("inference", BATCH),
        ),
        row("inference with SVP", images_per_second("inference with SVP", BATCH)),
        row(
            "training step with SVP",
            f"{step / forward:.2f} times the forward pass with SVP, "
            f"{step / ms['inference']:.2f} times the one without; "
            + images_per_second("training step with SVP", BATCH),
        ),
        row(
            "training step with SVP, reference",
            f"{ms['training step with SVP, reference'] / step:.1f} times ours; one run",
        ),
        row("inference, batch 1", "the latency of one image"),
    ]
    for kind in ("inference", "training step"):
        base = ms[f"{kind}, {tokens[0]} tokens"] / tokens[0]
        for count in tokens:
            name = f"{kind}, {count} tokens"
            rows.append(row(name, f"{ms[name] / count / base:.2f} times the time per token"))
    rows.append(row("nano Vim, batch 32", images_per_second("nano Vim, batch 32", 32)))
    for kind in ("mixer forward", "mixer forward and backward"):
        for name, version in result["peers"].items():
            key = f"{kind}, {name}"
            if key in ms:
                ours = ms[f"{kind}, svp_peft"]
                rows.append(row(key, f"{ms[key] / ours:.1f} times ours; {name} {version}"))
            else:
                rows.append((key, "-", version))
    rows.append(("peak memory of training", f"{result['peak_gib']:.2f} GiB", "whole process"))
    lines = [
        "| what | ms: median (quartiles) | |",
        "|---|---|---|",
        *("| " + " | ".join(cells) + " |" for cells in rows),
    ]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    try:
        pyplot = import_module("matplotlib.pyplot")
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    ms = {name: times["median"] for name, times in result["ms"].items()}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    bars = [name for name in list(ms)[:4]][::-1]
    left.barh(bars, [ms[name] for name in bars], color="#4c72b0")
    left.set_xlabel(f"ms, batch {BATCH}")
    left.set_title("Vim-Small, float32")
    for kind in ("inference", "training step"):
        values = [ms[f"{kind}, {count} tokens"] for count in result["tokens"]]
        right.loglog(result["tokens"], values, "o-", label=kind)
        first, last = result["tokens"][0], result["tokens"][-1]
        right.loglog([first, last], [values[0], values[0] * last / first], ":", color="grey")
    right.minorticks_off()
    right.set_xticks(result["tokens"], [f"{count:,}" for count in result["tokens"]])
    right.set_xlabel("tokens (dotted: linear)")
    right.set_ylabel("ms, batch 1")
    right.set_title("cost of more tokens")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--quick", action="store_true", help="a small model and few repeats")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/cpu"))
    parser.add_argument("--memory-of", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        report_memory(*options.memory_of)
        return
    missing = cpu.unavailable(torch.device("cpu"))
    if missing is not None:
        raise SystemExit(f"nothing to measure: {missing}")
    if options.quick:
        options.repeats = 2
    before = os.getloadavg()[0]
    if before > 0.5 and options.clock == "wall":
        print(f"warning: the load is {before:.1f}; other programs share the processor")
    result = measure(options)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    text = table(result)
    (options.output / "cpu.md").write_text(text)
    plot(result, options.output / "cpu.png")
    print(text)


if __name__ == "__main__":
    main()
