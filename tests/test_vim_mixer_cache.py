"""The mixer prepares frozen weights once: whatever changes them must be noticed."""

import copy
import pickle

import pytest
import torch
import torch.nn.utils.parametrize

from svp_peft.vim.mixer import VimMixer


@pytest.fixture
def mixer() -> VimMixer:
    return VimMixer(16, bimamba_type="v2").requires_grad_(False)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(2, 5, 16)


def fresh(mixer: VimMixer, tokens: torch.Tensor) -> torch.Tensor:
    """What a mixer with the same weights and no history computes."""
    twin = VimMixer(16, bimamba_type="v2").to(tokens.dtype)
    twin.load_state_dict(mixer.state_dict())
    return twin(tokens)


def test_frozen_weights_are_prepared_once(mixer, tokens):
    mixer(tokens)
    first = mixer._frozen.of(mixer)
    assert first is not None
    mixer(tokens)
    assert mixer._frozen.of(mixer) is first


def test_trained_weights_are_never_kept(mixer, tokens):
    mixer(tokens)
    mixer.conv1d.weight.requires_grad_(True)
    mixer(tokens).sum().backward()
    assert mixer.conv1d.weight.grad is not None
    assert mixer._frozen.of(mixer) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.conv1d.weight.mul_(2),
        lambda m: m.conv1d.weight.data.mul_(2),
        lambda m: setattr(m.conv1d.weight, "data", m.conv1d.weight.data * 2),
        lambda m: setattr(m.conv1d, "weight", torch.nn.Parameter(m.conv1d.weight * 2, False)),
        lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}),
        lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True),
    ],
    ids=["in place", "data in place", "data", "parameter", "load", "load by assignment"],
)
def test_changed_weights_are_noticed(mixer, tokens, change):
    before = mixer(tokens)
    with torch.no_grad():
        change(mixer)
    after = mixer(tokens)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, fresh(mixer, tokens), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["in_proj", "conv1d_b", "x_proj", "dt_proj_b", "out_proj"])
@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward", "parametrisation", "module"])
def test_a_submodule_wrapped_after_the_first_call_is_called(mixer, tokens, name, how):
    before = mixer(tokens)
    part, called = getattr(mixer, name), []
    if how == "hook":
        part.register_forward_hook(lambda *_: called.append(name))
    elif how == "pre-hook":
        part.register_forward_pre_hook(lambda *_: called.append(name))
    elif how == "forward":
        own = part.forward
        part.forward = lambda x: called.append(name) or own(x)
    elif how == "parametrisation":
        torch.nn.utils.parametrize.register_parametrization(part, "weight", Noted(called))
    else:
        setattr(mixer, name, torch.nn.Sequential(part, Noted(called)))
    after = mixer(tokens)
    assert called
    # the composed way sums in another order
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


class Noted(torch.nn.Module):
    """The identity, which tells that it was called."""

    def __init__(self, called: list[str]) -> None:
        super().__init__()
        self.called = called

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.called.append("")
        return x


def test_another_dtype_is_noticed(mixer, tokens):
    mixer(tokens)
    mixer.double()
    out = mixer(tokens.double())
    torch.testing.assert_close(out, fresh(mixer, tokens.double()), rtol=0, atol=0)


def test_a_copy_and_a_pickle_have_a_memory_of_their_own(mixer, tokens):
    expected = mixer(tokens)
    for twin in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer))):
        assert twin._frozen.of(twin) is None
        torch.testing.assert_close(twin(tokens), expected, rtol=0, atol=0)


def test_functional_call_uses_the_weights_it_is_given(mixer, tokens):
    mixer(tokens)
    doubled = {name: 2 * value for name, value in mixer.state_dict().items()}
    out = torch.func.functional_call(mixer, doubled, (tokens,))
    twin = VimMixer(16, bimamba_type="v2")
    twin.load_state_dict(doubled)
    torch.testing.assert_close(out, twin(tokens), rtol=0, atol=0)
