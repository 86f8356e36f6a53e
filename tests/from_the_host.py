"""Which ops a GPU would have to wait for, seen on a CPU."""

from torch.utils._python_dispatch import TorchDispatchMode


class FromTheHost(TorchDispatchMode):
    """Notes every op that makes a tensor of Python numbers, or Python numbers of a tensor.

    On a GPU each of them waits for the device, and none is allowed while a graph is captured.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.removesuffix("_")
        # index_put: an assignment to a list of positions
        if name in ("lift_fresh", "_local_scalar_dense", "nonzero", "equal", "index_put"):
            self.found.add(name)
        return function(*args, **(kwargs or {}))
