"""A training step or an inference call as one CUDA graph: the host out of the way.

    step = capture(train_step)          # train_step() reads static input tensors, does everything
    images.copy_(batch); labels.copy_(targets); loss = step()

At batch 8 a training step of Vim-Small is some 700 short launches, and Python takes several times
as long to issue them as the GPU to run them. A graph replays them all at once.

The rules are PyTorch's own: static tensors in, static tensors out, no synchronisation inside, an
optimiser that keeps its step count on the GPU (`capturable=True`), shapes that do not change. The
kernels of svp_peft are loaded during the warm-up runs, allocate only through PyTorch and follow
the current stream, so nothing else is needed. Weights may change between two replays, by
load_adapter too, as long as they stay where they are; adding or removing an adapter moves them and
needs a new capture.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def capture(function: Callable[[], T], warmup: int = 3) -> Callable[[], T]:
    """Record `function` once; the returned callable replays it.

    Args:
        function: takes nothing; reads and writes tensors that stay where they are. What it returns
            is returned by every replay: the same tensors, with new values.
        warmup: runs before the recording. They compile and load kernels, fill caches and create
            the optimiser's state, none of which may happen while recording; they do train.

    Raises:
        svp_peft.SVPError: a kernel was needed for the first time while recording (warmup=0).
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> T:
        graph.replay()
        return result

    return replay
