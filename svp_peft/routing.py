"""`route`: every image of a batch its own adapter and head, in one pass through the backbone.

The frozen blocks, nearly all of the work, see the whole batch at once. Only the prompters and the
heads are run per adapter, on the rows of the images that asked for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from svp_peft.adapter_tensors import module_of
from svp_peft.config import BASE_ADAPTER
from svp_peft.errors import AdapterNameError, InputError
from svp_peft.grouped import GroupedPrompts
from svp_peft.prompters import simam
from svp_peft.state import (
    Routing,
    SVPState,
    module_path,
    patched_model,
    svp_of,
    use_modules_of,
)


class route:  # used as a function, `with route(...)`, and named like one
    """Context in which image i of every batch gets adapter `names[i]` and that adapter's head.

        with sp.route(model, ["birds", "cars", "__base__"]) as routed:
            logits = model(images)              # (3, widest number of classes)
        per_task = routed.per_adapter(logits)   # {"birds": (1, 200), "cars": (1, 196), ...}

    Row i equals what the model gives for image i with `set_adapter(model, names[i])` (for
    "__base__": within `disable_adapter`), up to float32 rounding. Where heads have different
    numbers of classes, rows are padded with -inf to the widest, so that softmax and argmax need
    no care. Gradients reach every adapter that was named; use it in training too, but not with
    label smoothing, for which a padded class has an infinite loss.

    The context replaces an active `disable_adapter`, may itself be interrupted by one, and nests.
    `set_adapter`, `delete_adapter` and loading are refused within it.

    Args:
        names: one adapter name for each image; "__base__" for the base model.

    Raises:
        AdapterNameError: a name is unknown, or no longer known when the context is entered.
        InputError: an adapter has its own copy of a module other than the head, or, when the model
            is called, the batch has another length than `names`; before any block runs.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = patched_model(model)
        self.svp = svp_of(model)
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise InputError(
                f"route got names={names!r}, not a list of adapter names: every image of the batch "
                f"needs its own. Pass for example {self.svp.adapters.names()[:1]} * len(images)."
            )
        self.names = tuple(names)
        _check_names(self.svp, self.names)
        self.groups: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            self.groups.setdefault(name, []).append(index)
        # position in the sorted batch -> image, and back
        self._order = [index for rows in self.groups.values() for index in rows]
        self._inverse = sorted(range(len(self._order)), key=self._order.__getitem__)
        self._indices: dict[tuple[bool, int, torch.device], Tensor] = {}
        named = {name: rows for name, rows in self.groups.items() if name != BASE_ADAPTER}
        self._grouped = GroupedPrompts(named, len(self.names))
        self._widths: dict[str, int] = {}
        # one entry for every `with` that this object stands in now
        self._before: list[tuple[Routing | None, int]] = []
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> route:
        # adapters may have gone since the object was made
        _check_names(self.svp, self.names)
        self._grouped.forget()
        self._before.append((self.svp.routing, self.svp.disabled))
        self.svp.routing, self.svp.disabled = self, 0
        use_modules_of(self.model, self.svp.effective)
        if "head" in self.svp.in_use and self._handle is None:
            head = self.model.get_submodule(module_path(self.svp.spec, "head"))
            hook = _RouteHead(self, self.svp.in_use["head"])
            self._handle = head.register_forward_hook(hook, with_kwargs=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._grouped.forget()
        self.svp.routing, self.svp.disabled = self._before.pop()
        if self._handle is not None and not self._before:
            self._handle.remove()
            self._handle = None
        if self.model._modules.get("svp") is self.svp:
            use_modules_of(self.model, self.svp.effective)

    def per_adapter(self, logits: Tensor) -> dict[str, Tensor]:
        """Rows of the model's output by adapter, in the order of the batch and without padding."""
        return {
            name: logits[rows][..., : self._widths.get(name, logits.shape[-1])]
            for name, rows in self.groups.items()
        }

    def check_batch(self, batch: int) -> None:
        """Raise `InputError` unless there is one name for every image."""
        if batch != len(self.names):
            raise InputError(
                f"the model was called with {batch} images inside route(...) with "
                f"{len(self.names)} adapter names: every image needs exactly one. Give as many "
                "names as there are images."
            )

    def images(self, svp: SVPState, images: Tensor) -> Tensor:
        """SimAM on those images whose adapter wants it."""
        wanting = {
            n for n in self.groups if n != BASE_ADAPTER and svp.require(n).config.simam_input
        }
        if not wanting:
            return images
        return self._join([simam(x) if name in wanting else x for name, x in self._split(images)])

    def prompt(self, svp: SVPState, x: Tensor, block: int, skip: tuple[int, ...]) -> Tensor:
        """Each row of `x` (batch, L, d_model) prompted by its own adapter."""
        if _on_gpu(x):
            adapters = {name: svp.adapter_named(name) for name in self._grouped.groups}
            together = self._grouped.prompting(adapters, block)
            if together is not None:
                self._repeat(x)
                return self._grouped(x, adapters, together, block, skip)
        parts = self._split(x)
        return self._join(
            [
                rows if name == BASE_ADAPTER else svp.adapter_named(name)(rows, block, skip)
                for name, rows in parts
            ]
        )

    def head(self, in_use: str, features: Tensor, output: Tensor) -> Tensor:
        """Each row of `features` through its own adapter's head.

        Args:
            in_use: owner of the head that made `output` from all rows; its own rows are taken
                from there.
        """
        logits: list[Tensor] = []
        outputs = [rows for _, rows in self._split(output)]
        for (name, rows), made in zip(self._split(features), outputs, strict=True):
            owner = name
            if name != BASE_ADAPTER and "head" not in self.svp.require(name).config.modules_to_save:
                owner = BASE_ADAPTER
            own = made
            if owner != in_use:
                own = module_of(self.model, self.svp, owner, "head")(rows)
            self._widths[name] = own.shape[-1]
            logits.append(own)
        widest = max(self._widths[name] for name in self.groups)
        return self._join(
            [
                F.pad(own, (0, widest - own.shape[-1]), value=float("-inf"))
                if own.shape[-1] < widest
                else own
                for own in logits
            ]
        )

    def _split(self, x: Tensor) -> list[tuple[str, Tensor]]:
        """Rows of `x` by adapter; several consecutive rows may belong to one image (windows)."""
        repeat = self._repeat(x)
        if len(self.groups) > 1:
            x = self._reorder(x, repeat, inverse=False)
        sizes = [len(rows) * repeat for rows in self.groups.values()]
        return list(zip(self.groups, x.split(sizes), strict=True))

    def _repeat(self, x: Tensor) -> int:
        """Rows of `x` for each image."""
        repeat, rest = divmod(x.shape[0], len(self.names))
        if rest or not repeat:
            raise InputError(
                f"{x.shape[0]} rows reached a block inside route(...) with {len(self.names)} "
                "adapter names: they cannot be shared out among the images. Pass one name for "
                "each image of the batch."
            )
        return repeat

    def _join(self, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        joined = torch.cat(tuple(parts))
        return self._reorder(joined, joined.shape[0] // len(self.names), inverse=True)

    def _reorder(self, x: Tensor, repeat: int, *, inverse: bool) -> Tensor:
        order = self._inverse if inverse else self._order
        if order == sorted(order):
            return x
        key = (inverse, repeat, x.device)
        if key not in self._indices:
            rows = [image * repeat + k for image in order for k in range(repeat)]
            # one made in inference mode could not be used for training
            with torch.inference_mode(False):
                self._indices[key] = torch.tensor(rows, device=x.device)
        return x.index_select(0, self._indices[key])


class _RouteHead:
    """Forward hook of the head in use: replaces its output by that of every image's own head."""

    def __init__(self, routing: route, in_use: str) -> None:
        self.routing = routing
        self.in_use = in_use

    def __call__(
        self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        # an inner route or disable_adapter has taken over
        if self.routing.svp.routing is not self.routing or self.routing.svp.disabled:
            return output
        features = args[0] if args else next(iter(kwargs.values()))
        return self.routing.head(self.in_use, features, output)


def _on_gpu(x: Tensor) -> bool:
    # grouping pads: it pays where one adapter's products are too small to fill the device
    return x.is_cuda


def _check_names(svp: SVPState, names: tuple[str, ...]) -> None:
    if not names:
        raise InputError(
            "route got no adapter names: every image of the batch needs one. Pass for example "
            f"{svp.adapters.names()[:1]} * len(images)."
        )
    unknown = sorted({repr(n) for n in names if n != BASE_ADAPTER and not svp.has(n)})
    if unknown:
        raise AdapterNameError(
            f"route got names that are no adapters of this model: {', '.join(unknown)}. Its "
            f"adapters are {svp.adapters.names()}; '{BASE_ADAPTER}' is the base model."
        )
    for name in set(names) - {BASE_ADAPTER}:
        own = [role for role in svp.require(name).config.modules_to_save if role != "head"]
        if own:
            raise InputError(
                f"adapter {name!r} has its own copy of {own}: route shares everything but the "
                "prompters and heads among the images. Use set_adapter for it, or train it with "
                "modules_to_save=('head',)."
            )
