"""Whether a fused op may read the weights of submodules, or has to call them.

Someone may have wrapped a submodule (a hook, a parametrisation, a LoRA layer, quantised weights):
then only calling it gives the right result, and nothing may ever be bypassed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from svp_peft import ops


def is_bare(module: nn.Module, expected: type[nn.Module]) -> bool:
    """Whether `module(x)` is nothing but its class's formula over its own plain parameters.

    False for a subclass (LoRA and quantised layers, parametrisations), for hooks of any kind, for
    a replaced `forward` and for weights that are tensor subclasses.
    """
    return (
        type(module) is expected
        and type(module.weight) in (nn.Parameter, Tensor)
        and not is_hooked(module)
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module runs more than its class's `forward`."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def every_module_is_hooked() -> bool:
    """Whether a hook on all modules of the process, as some profilers set, expects to see ours."""
    hooks = nn.modules.module
    return bool(
        hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


class FrozenWeights(ops.Cache):
    """The weights that a mixer's frozen, bare submodules make up, for as long as they do.

    Gathering them and asking each submodule again at every call takes a slow host longer than
    launching the kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stack = ops.Cache()
        """For the run of blocks that begins with the mixer's."""
        self._weights: ops.MixerWeights | None = None
        self._parts: tuple[tuple[str, nn.Module, type, Tensor | None, Tensor | None], ...] = ()
        self._own: tuple[tuple[str, Tensor | None], ...] = ()
        self._taps: tuple[tuple[Tensor, Tensor], ...] = ()

    def fill(
        self,
        mixer: nn.Module,
        weights: ops.MixerWeights,
        parts: Sequence[str],
        own: Sequence[str],
    ) -> None:
        """Remember `weights` and what they were made of.

        Args:
            parts: names of the bare submodules of `mixer`; its convolutions in the order of the
                weights.
            own: names of the parameters of its own.
        """
        self.prepared = None
        found = [(name, mixer._modules[name]) for name in parts]
        self._parts = tuple(
            (name, m, type(m), m._parameters.get("weight"), m._parameters.get("bias"))
            for name, m in found
            if m is not None
        )
        self._own = tuple((name, mixer._parameters[name]) for name in own)
        convolutions = [weight for _, _, kind, weight, _ in self._parts if kind is nn.Conv1d]
        self._taps = tuple(zip(convolutions, weights.conv_weight, strict=True))  # type: ignore[arg-type]
        self._weights = weights

    def of(self, mixer: nn.Module) -> ops.MixerWeights | None:
        """The weights, if every submodule and parameter is still in its place, bare and frozen."""
        if self._weights is None or every_module_is_hooked():
            return None
        modules = mixer._modules
        for name, module, kind, weight, bias in self._parts:
            if modules.get(name) is not module or type(module) is not kind or is_hooked(module):
                return None
            parameters = module._parameters
            if parameters.get("weight") is not weight or parameters.get("bias") is not bias:
                return None
            if weight is None or weight.requires_grad or (bias is not None and bias.requires_grad):
                return None
        parameters = mixer._parameters
        for name, parameter in self._own:
            if parameters.get(name) is not parameter:
                return None
            if parameter is None or parameter.requires_grad:
                return None
        # the taps are a view, which an assignment to `.data` leaves behind
        for weight, taps in self._taps:
            if weight.data_ptr() != taps.data_ptr():
                return None
        return self._weights
