"""Every error that svp_peft raises on purpose.

Each one derives from `SVPError` and from the built-in a Python programmer would expect, so both
`except sp.SVPError` and `except ValueError` work. Messages say what happened, why, and what to do.
"""


class SVPError(Exception):
    """Base of every error svp_peft raises on purpose."""


class ConfigError(SVPError, ValueError):
    """A field of `SVPConfig` has a value that cannot work, or is unknown."""


class InputError(SVPError, ValueError):
    """An argument, or the data given to a patched model, has a value that cannot work."""


class BackboneNotSupportedError(SVPError, TypeError):
    """The model has no stack of blocks that svp_peft recognises, or cannot be patched as it is."""


class AlreadyAppliedError(SVPError, RuntimeError):
    """`apply_svp` was called on a model that already carries SVP adapters."""


class NotAppliedError(SVPError, RuntimeError):
    """A function that needs a patched model was given one without SVP adapters."""


class AdapterNameError(SVPError, ValueError):
    """An adapter name is malformed, reserved, taken, or unknown to the model."""


class MergeError(SVPError, NotImplementedError):
    """SVP prompts depend on the input and cannot be merged into weights."""


class AdapterNotFoundError(SVPError, FileNotFoundError):
    """There is no adapter at the given folder or Hub repository."""


class AdapterConfigError(ConfigError):
    """`adapter_config.json` is unreadable or describes something that cannot be built."""


class AdapterWeightsError(SVPError, ValueError):
    """`adapter_model.safetensors` is unreadable or holds values that cannot be an adapter."""


class AdapterKeyError(AdapterWeightsError):
    """The adapter file lacks tensors, or holds tensors the adapter does not have."""


class AdapterShapeError(AdapterWeightsError):
    """A tensor of the adapter file has another shape than the model's."""


class AdapterSaveError(SVPError, OSError):
    """An adapter could not be written; what stood in its place before is still there."""


class BaseModelMismatchError(SVPError, ValueError):
    """The adapter was trained on another base model than the one it is loaded into."""


class CheckpointError(SVPError, ValueError):
    """A base checkpoint has wrong or missing keys, or is not safe to unpickle."""


class HubError(SVPError, OSError):
    """The Hugging Face Hub refused, failed, or cannot be reached."""


class HubUnreachable(HubError):
    """No answer, or the Hub's own failure (HTTP 5xx): trying again later may help."""


class BackendError(SVPError, RuntimeError):
    """A named backend cannot run here; the message says why and the remedy."""
