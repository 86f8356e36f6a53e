"""Many small training runs at once on one GPU, or one after the other on a CPU.

A `Bench` holds one model, one task and every buffer its training step reads, all on the device.
On a GPU the step is captured as a CUDA graph, once, and replayed for any number of runs; benches
replay on their own streams, for a step of this small model fills a fraction of a GPU. They share
PyTorch's random numbers on the GPU, so which images drop path leaves out depends on how the streams
interleave: on a GPU a repeated run gives the same accuracies up to that chance.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from evidence_tasks import SIZE, TASKS, TEST, Task
from methods import apply_method
from torch import Tensor, nn

import svp_peft as sp

BACKBONE = Path(__file__).parent / "assets" / "vim_nano_tin"
BATCH = 64
EVAL_BATCH = 250
WEIGHT_DECAY = 1e-4
WARMUP = 0.1
SMOOTHING = 0.1
DROP_PATH = 0.05
SHIFT = 4
VALIDATION = 200
GROUP_SIZE = 4
BOTTLENECK = 64


@dataclass
class Bench:
    """One model on one task, and every buffer that its training step reads.

    All of them stay where they are, so a captured step can be replayed for any number of runs.
    """

    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    trained: list[nn.Parameter]
    images: Tensor
    """uint8 (n, 72, 72, 3): training images with their edges repeated."""
    labels: Tensor
    order: Tensor
    """int64 (steps, 64): the images of each step."""
    moves: Tensor
    """int64 (steps, 64, 3): first row, first column, and whether to flip."""
    rates: Tensor
    """float (steps,): learning rate of each step."""
    eval_images: Tensor
    """uint8 (4000, 64, 64, 3), of which the first eval_count[0] count."""
    eval_labels: Tensor
    eval_count: Tensor
    mean: Tensor
    std: Tensor
    step: Tensor
    hits: Tensor
    seen: Tensor
    half: bool = False
    """Whether products are in bfloat16; otherwise in float32, TF32 on a GPU."""
    stream: Any = None
    graphs: dict[str, Any] = field(default_factory=dict)


def new_model(method: str, num_classes: int, seed: int, options: dict[str, int]) -> nn.Module:
    torch.manual_seed(seed)
    model = sp.load_vim(BACKBONE, num_classes=num_classes, drop_path_rate=DROP_PATH)
    settings = {"cross_group_size": GROUP_SIZE, "inner_bottleneck": BOTTLENECK} | options
    return apply_method(model, method, **settings)


def new_bench(
    task: Task,
    method: str,
    options: dict[str, int],
    steps: int,
    device: torch.device,
    half: bool = False,
) -> Bench:
    model = new_model(method, task.num_classes, 0, options).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        trained,
        # a tensor, so that a captured step reads the rate of its own step
        lr=torch.zeros((), device=device) if on_gpu else 0.0,
        weight_decay=WEIGHT_DECAY,
        fused=on_gpu,
        capturable=on_gpu,
    )
    padded = F.pad(task.train_images.permute(0, 3, 1, 2).float(), (SHIFT,) * 4, mode="replicate")

    def integers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    return Bench(
        task=task,
        model=model,
        optimizer=optimizer,
        trained=trained,
        images=padded.permute(0, 2, 3, 1).byte().contiguous().to(device),
        labels=task.train_labels.to(device),
        order=integers(steps, BATCH),
        moves=integers(steps, BATCH, 3),
        rates=torch.zeros(steps, device=device),
        eval_images=torch.zeros(TEST, SIZE, SIZE, 3, dtype=torch.uint8, device=device),
        eval_labels=integers(TEST),
        eval_count=integers(1),
        mean=torch.tensor([0.485, 0.456, 0.406], device=device) * 255,
        std=torch.tensor([0.229, 0.224, 0.225], device=device) * 255,
        step=integers(1),
        hits=integers(1),
        seen=integers(1),
        half=half,
        stream=torch.cuda.Stream(device) if on_gpu else None,
    )


# ---- one step ------------------------------------------------------------------------------------


def normalised(bench: Bench, pixels: Tensor) -> Tensor:
    """uint8 (batch, 64, 64, 3) to float (batch, 3, 64, 64) with ImageNet's mean and deviation."""
    return ((pixels.float() - bench.mean) / bench.std).permute(0, 3, 1, 2).contiguous()


def train_step(bench: Bench) -> None:
    """One step of training; reads and advances `bench.step`, and nothing waits for the device."""
    chosen = bench.order.index_select(0, bench.step)[0]
    row, column, flip = bench.moves.index_select(0, bench.step)[0].unbind(1)
    along = torch.arange(SIZE, device=chosen.device)
    rows = row[:, None] + along
    columns = column[:, None] + torch.where(flip[:, None] > 0, SIZE - 1 - along, along)
    pixels = bench.images[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
    with _precision(bench):
        logits = bench.model(normalised(bench, pixels))
    loss = F.cross_entropy(logits.float(), bench.labels[chosen], label_smoothing=SMOOTHING)
    loss.backward()
    rate = bench.rates.index_select(0, bench.step)[0]
    group = bench.optimizer.param_groups[0]
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(rate)
    else:
        group["lr"] = rate.item()
    bench.optimizer.step()
    bench.step += 1


@torch.no_grad()
def eval_step(bench: Bench) -> None:
    """The next 250 evaluation images; adds to `hits` and advances `seen`."""
    places = bench.seen + torch.arange(EVAL_BATCH, device=bench.seen.device)
    inside = places < bench.eval_count
    places = places.clamp(max=len(bench.eval_labels) - 1)
    with _precision(bench):
        logits = bench.model(normalised(bench, bench.eval_images[places]))
    bench.hits += ((logits.argmax(1) == bench.eval_labels[places]) & inside).sum()
    bench.seen += EVAL_BATCH


def run_step(bench: Bench, kind: str) -> None:
    if kind in bench.graphs:
        bench.graphs[kind].replay()
        return
    bench.model.train(kind == "train")
    {"train": train_step, "eval": eval_step}[kind](bench)
    bench.optimizer.zero_grad(set_to_none=True)


def capture(bench: Bench) -> None:
    """Record both steps as CUDA graphs."""
    with torch.cuda.stream(bench.stream):
        for kind in ("train", "eval"):
            for _ in range(3):
                bench.step.zero_()
                run_step(bench, kind)
    bench.stream.synchronize()
    for kind, step in (("train", train_step), ("eval", eval_step)):
        graph = torch.cuda.CUDAGraph()
        bench.model.train(kind == "train")
        with torch.cuda.graph(graph, stream=bench.stream):
            step(bench)
        bench.graphs[kind] = graph


# ---- one run per task ----------------------------------------------------------------------------


@torch.no_grad()
def reset(
    bench: Bench, state: dict[str, Tensor], seed: int, lr: float, epochs: int, val: int
) -> int:
    """Make the bench start a new run; returns its number of steps.

    `val` of the training images are kept to evaluate on; 0 evaluates on the test images.
    """
    for name, parameter in bench.model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(state[name], non_blocking=True)
    for values in bench.optimizer.state.values():
        for tensor in values.values():
            tensor.zero_()
    task, count = bench.task, len(bench.labels) - val
    random = torch.Generator().manual_seed(1000 * seed + TASKS.index(task.name))
    order = torch.cat([torch.randperm(count, generator=random) for _ in range(epochs)])
    steps = len(order) // BATCH
    low, high = (0, 2 * SHIFT + 1) if task.augmented else (SHIFT, SHIFT + 1)
    moves = torch.randint(low, high, (steps, BATCH, 3), generator=random)
    flips = torch.randint(0, 2, (steps, BATCH), generator=random)
    moves[..., 2] = flips if task.flipped else 0
    at = torch.arange(steps) + 1.0
    warmup = max(int(WARMUP * steps), 1)
    cosine = 0.5 * (1 + torch.cos(math.pi * (at - warmup) / max(steps - warmup, 1)))
    rates = lr * torch.where(at <= warmup, at / warmup, cosine)
    bench.order[:steps] = order[: steps * BATCH].view(steps, BATCH).to(bench.order.device)
    bench.moves[:steps] = moves.to(bench.moves.device)
    bench.rates[:steps] = rates.to(bench.rates.device)
    images = task.train_images[count:] if val else task.test_images
    labels = task.train_labels[count:] if val else task.test_labels
    bench.eval_images[: len(images)] = images.to(bench.eval_images.device)
    bench.eval_labels[: len(labels)] = labels.to(bench.eval_labels.device)
    bench.eval_count.fill_(len(labels))
    for counter in (bench.step, bench.hits, bench.seen):
        counter.zero_()
    return steps


def run_together(
    benches: list[Bench], states: list[dict], seed: int, rates: list[float], epochs: int, val: int
) -> list[float]:
    """One run on every bench, step by step in turn; accuracies between 0 and 1."""
    lengths = []
    for bench, state, lr in zip(benches, states, rates, strict=True):
        with _on(bench):
            lengths.append(reset(bench, state, seed, lr, epochs, val))
    for step in range(max(lengths)):
        for bench, length in zip(benches, lengths, strict=True):
            if step < length:
                with _on(bench):
                    run_step(bench, "train")
    for bench in benches:
        with _on(bench):
            for _ in range(-(-(val or len(bench.task.test_labels)) // EVAL_BATCH)):
                run_step(bench, "eval")
    accuracies = []
    for bench in benches:
        with _on(bench):
            accuracies.append(bench.hits.item() / bench.eval_count.item())
    return accuracies


def _precision(bench: Bench) -> AbstractContextManager:
    # a cache of converted weights would outlive the recording of a graph
    device = bench.images.device.type
    return torch.autocast(device, torch.bfloat16, enabled=bench.half, cache_enabled=False)


def _on(bench: Bench) -> AbstractContextManager:
    return torch.cuda.stream(bench.stream) if bench.stream else nullcontext()
