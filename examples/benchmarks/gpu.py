"""How fast Vim with SVP trains and answers on this GPU, against other code and the floor.

    python examples/benchmarks/gpu.py [--output DIR] [--authors DIR] [--quick]

Training is one step of SVP: forward, cross entropy, backward, AdamW on prompters and head. Weights
are random, for time does not depend on them. Every number is the median of 20 runs after warm-up,
timed with CUDA events, with the fastest and the slowest beside it. "graph" replays a CUDA graph
(examples/cuda_graphs.py). The same run times, where they can be had,

    mamba_ssm        the same models on stock mamba-ssm and causal-conv1d (set_backend("mamba_ssm"))
    authors' code    the released SVP (--authors; see authors_code.py)

Writes gpu.json and gpu.png to --output and prints the table. --quick leaves out Vim-Tiny, Vim-Base
and float32.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PRECISIONS = ("fp32", "tf32", "bf16")
Context = Callable[[], AbstractContextManager[Any]]


@contextmanager
def precision(name: str) -> Iterator[Context]:
    """float32 with or without TF32 products, or bfloat16 autocast; yields the forward's context."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name != "fp32"
    try:
        # weights keep their bfloat16 copies inside svp_peft; a cache would outlive a graph
        yield (
            (lambda: torch.autocast("cuda", torch.bfloat16, cache_enabled=False))
            if name == "bf16"
            else nullcontext
        )
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def steps(
    model: torch.nn.Module,
    batch: int,
    size: int,
    context: Context,
    logits_of: Callable[[Any], torch.Tensor] = lambda out: out,
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A training step and an inference call on random images of size x size."""
    images = torch.randn(batch, 3, size, size, device="cuda")
    labels = torch.randint(0, 100, (batch,), device="cuda")
    trainable = [p for p in model.parameters() if p.requires_grad]
    # a frozen model without prompts is only asked to answer, and AdamW refuses an empty list
    trainable = trainable or [torch.zeros(1, device="cuda", requires_grad=True)]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True, capturable=True)

    def train() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with context():
            loss = F.cross_entropy(logits_of(model(images)), labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        return loss.detach()  # the loss itself would keep its graph alive, and that the stream

    def infer() -> torch.Tensor:
        with torch.no_grad(), context():
            return logits_of(model(images))

    return train, infer


def measure(run: Callable[[], Any], batch: int, repeats: int = 20) -> dict[str, float]:
    """Median, fastest and slowest of `repeats` runs (ms), images per second, peak memory (GiB)."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in events)
    median = times[len(times) // 2]
    return {
        "ms": median,
        "fastest_ms": times[0],
        "slowest_ms": times[-1],
        "images_per_s": 1e3 * batch / median,
        "peak_GiB": torch.cuda.max_memory_allocated() / 2**30,
    }


def floor_ms(width: int, batch: int, tokens: int, training: bool) -> float:
    """What the hardware needs at least for the 24 blocks, in ms: see docs/performance.md.

    Matrix products at 700 TFLOP/s, and the larger of: 16 passes over a (tokens, d_inner) bfloat16
    tensor per block at 3.0 TB/s, and the exponentials of both scans at 16 per clock and
    multiprocessor. Training takes three times the forward pass.
    """
    properties = torch.cuda.get_device_properties(0)
    d_inner, rows = 2 * width, batch * tokens
    block_products = (
        3 * d_inner * width + 2 * d_inner * (width // 16 * 2 + 32) + width * (width + 128)
    )
    products = 24 * rows * block_products * 2 / 700e12
    traffic = 24 * 16 * rows * d_inner * 2 / 3.0e12
    exponentials = 24 * 2 * 16 * rows * d_inner / (16 * properties.multi_processor_count * 1.755e9)
    return 1e3 * (products + max(traffic, exponentials)) * (3 if training else 1)


def build(name: str, *, prompted: bool = True, **arguments: Any) -> torch.nn.Module:
    """A model on the GPU with random weights; prompted with scales as after training."""
    import svp_peft as sp

    torch.manual_seed(0)
    maker = {"Vim-Tiny": sp.vim_tiny, "Vim-Small": sp.vim_small, "Vim-Base": sp.vim_base}[name]
    model = maker(num_classes=100, drop_path_rate=0.1, **arguments).cuda()
    if prompted:
        sp.apply_svp(model, sp.SVPConfig(cross_group_size=8, inner_bottleneck=64))
        with torch.no_grad():
            model.svp.alpha.normal_(std=0.1)
            model.svp.beta.normal_(std=0.1)
    return model


class Report:
    """Collects rows and prints each as it comes."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> dict[str, Any]:
        self.rows.append(row)
        share = f"  {row['share_of_floor']:.0%} of the floor" if "share_of_floor" in row else ""
        print(
            f"{row['path']:14s} {row['model']:9s} {row['kind']:22s} batch {row['batch']:3d} "
            f"{row['precision']:4s} {row['mode']:5s} {row['ms']:8.2f} ms "
            f"({row['fastest_ms']:.2f}-{row['slowest_ms']:.2f}) {row['images_per_s']:9.1f} img/s "
            f"{row['peak_GiB']:5.2f} GiB{share}",
            flush=True,
        )
        return row


def time_model(
    report: Report,
    model: torch.nn.Module,
    labels: dict[str, Any],
    width: int,
    batch: int,
    precision_name: str,
    modes: tuple[str, ...],
    kinds: tuple[str, ...] = ("training", "inference"),
    size: int = 224,
) -> None:
    """Rows for one model, batch and precision."""
    from cuda_graphs import capture

    with precision(precision_name) as context:
        runs = dict(zip(("training", "inference"), steps(model, batch, size, context), strict=True))
        for kind in kinds:
            for mode in modes:
                # not in every step: svp_peft converts frozen weights again when the mode is set
                model.train(kind == "training")
                run = runs[kind] if mode == "eager" else capture(runs[kind])
                found = measure(run, batch)
                floor = floor_ms(width, batch, (size // 16) ** 2 + 1, kind == "training")
                report.add(
                    **{"kind": kind, **labels, "batch": batch, "precision": precision_name},
                    mode=mode,
                    **found,
                    floor_ms=floor,
                    share_of_floor=floor / found["ms"],
                )
                del run
                torch.cuda.empty_cache()


def linearity(report: Report) -> dict[str, float]:
    """Inference time per token at 224, 448 and 896 pixels, relative to 224.

    Once with the batch that keeps the number of tokens, once with the same batch for all: the scan
    has one lane per channel and image, so six images of 896 pixels do not fill the GPU.
    """
    found = {}
    for label, batches in (("same tokens", (96, 24, 6)), ("batch 24", (24, 24, 24))):
        per_token = []
        for size, batch in zip((224, 448, 896), batches, strict=True):
            model = build("Vim-Small", img_size=size)
            labels = {"path": "svp_peft", "model": "Vim-Small", "kind": f"inference {size} px"}
            time_model(report, model, labels, 384, batch, "bf16", ("graph",), ("inference",), size)
            tokens = (size // 16) ** 2 + 1
            per_token.append(report.rows[-1]["ms"] / (batch * tokens))
            found[f"{size} px, {label}"] = per_token[-1] / per_token[0]
    return found


def accuracy(batch: int = 4) -> dict[str, float]:
    """||logits - float64 logits|| / ||float64 logits|| of bfloat16 runs of the same Vim-Small."""
    import svp_peft as sp

    model = build("Vim-Small").eval()
    images = torch.randn(batch, 3, 224, 224, device="cuda")
    found = {}
    with torch.no_grad():
        for backend in ("cuda", "mamba_ssm"):
            sp.set_backend(backend)
            try:
                with torch.autocast("cuda", torch.bfloat16):
                    found[backend] = model(images).double()
            except sp.SVPError as error:
                print(f"{backend}: {error}")
        sp.set_backend("reference")
        truth = model.double()(images.double())
        sp.set_backend("auto")
    return {name: ((x - truth).norm() / truth.norm()).item() for name, x in found.items()}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Images per second of Vim-Small at batch 96 and 8, path by path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    for axis, kind in zip(axes, ("training", "inference"), strict=True):
        chosen = [r for r in rows if r["model"] == "Vim-Small" and r["kind"] == kind]
        chosen = [r for r in chosen if r["batch"] in (8, 96)]
        names = [f"{r['path']}, {r['precision']} {r['mode']}, {r['batch']}" for r in chosen]
        axis.barh(names, [r["images_per_s"] for r in chosen])
        axis.set_xscale("log")
        axis.set_title(f"Vim-Small, {kind}: images per second")
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    import svp_peft as sp

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_gpu"))
    parser.add_argument("--authors", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    report = Report()
    both = ("eager", "graph")

    summary: dict[str, Any] = {}

    def save() -> None:
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
        content = {"machine": machine, "rows": report.rows, "summary": summary}
        (options.output / "gpu.json").write_text(json.dumps(content, indent=1))
        plot(report.rows, options.output / "gpu.png")

    model = build("Vim-Small")
    ours = {"path": "svp_peft", "model": "Vim-Small"}
    for batch in (96, 8, 1):
        time_model(report, model, ours, 384, batch, "bf16", both)
    sp.set_backend("mamba_ssm")
    try:
        stock = {"path": "mamba_ssm", "model": "Vim-Small"}
        for batch in (96, 8):
            time_model(report, model, stock, 384, batch, "bf16", both[:1])
    except sp.SVPError as error:
        print(f"mamba_ssm is not timed: {error}")
    sp.set_backend("auto")

    bare = build("Vim-Small", prompted=False)
    full = {**ours, "kind": "full fine-tuning"}
    time_model(report, bare, full, 384, 96, "bf16", both, ("training",))
    bare.requires_grad_(False)
    plain = {**ours, "kind": "inference, no prompts"}
    time_model(report, bare, plain, 384, 96, "bf16", both, ("inference",))
    del bare
    summary["time per token relative to 224 px"] = linearity(report)
    summary["error of bfloat16 logits"] = accuracy()
    save()
    if options.authors is not None:
        out = options.output / "authors.json"
        script = Path(__file__).with_name("authors_code.py")
        torch.cuda.empty_cache()
        done = subprocess.run([sys.executable, str(script), str(options.authors), str(out)])
        if done.returncode == 0:
            report.rows += json.loads(out.read_text())
        save()
    if not options.quick:
        for name in ("tf32", "fp32"):
            for batch in (96, 8, 1):
                time_model(report, model, ours, 384, batch, name, both if batch == 8 else both[:1])
        del model
        for name, width in (("Vim-Tiny", 192), ("Vim-Base", 768)):
            other = build(name)
            for batch in (96, 8, 1):
                labels = {"path": "svp_peft", "model": name}
                time_model(report, other, labels, width, batch, "bf16", both)
            del other
        save()
    for name, values in summary.items():
        print(name, {key: float(f"{value:.3g}") for key, value in values.items()})


if __name__ == "__main__":
    main()
