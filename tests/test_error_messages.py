"""Errors say what happened, why, and what to do; this file pins the wording."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import svp_peft
from svp_peft import errors
from tests.lookalikes import VimLike

PACKAGE = Path(svp_peft.__file__).parent
CONFIG = svp_peft.SVPConfig(inner_bottleneck=4, cross_group_size=2)


def patched(**kwargs) -> nn.Module:
    return svp_peft.apply_svp(VimLike(**kwargs).eval(), CONFIG)


def error_types() -> list[type]:
    return [
        t for _, t in inspect.getmembers(errors, inspect.isclass) if t.__module__ == errors.__name__
    ]


def test_every_error_is_an_svp_error_with_a_docstring_and_a_built_in_beside_it():
    for kind in error_types():
        assert issubclass(kind, svp_peft.SVPError)
        assert kind.__doc__
        if kind is not svp_peft.SVPError:
            others = set(kind.__mro__) - {*error_types(), Exception, BaseException, object}
            assert others, f"{kind.__name__} should also be the built-in error one would expect"


METHOD = (
    "config prompters backbones state hooks heads patch adapter_tensors adapters routing verify"
)


@pytest.mark.parametrize("module", METHOD.split())
def test_the_method_raises_its_own_errors_only(module):
    own = {kind.__name__ for kind in error_types()}
    files = [PACKAGE / f"{module}.py"] if (PACKAGE / f"{module}.py").exists() else []
    files += (PACKAGE / module).glob("*.py")
    raised = {
        node.exc.func.id
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    }
    assert files
    assert raised <= own


CASES = {
    "config": (
        lambda: svp_peft.SVPConfig(cross_group_size=0),
        "cross_group_size=0 must be an integer from 1 to 1000000: it counts the blocks that share "
        "a cross prompter. Try 8.",
    ),
    "second apply": (
        lambda: svp_peft.apply_svp(patched(), CONFIG),
        "this model already has an SVP adapter: a second one would prompt every block twice. Use "
        "add_adapter(model, name) for another adapter, load_adapter(model, path) to replace its "
        "weights, or remove_svp(model) to start over.",
    ),
    "not applied": (
        lambda: svp_peft.remove_svp(VimLike()),
        "VimLike carries no SVP adapter: it was never patched, or remove_svp was called. Call "
        "apply_svp(model, SVPConfig()) or load_adapter(model, path) first.",
    ),
    "other model": (
        lambda: svp_peft.apply_svp(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), CONFIG),
        "Sequential is not a supported Vision Mamba model: no module has blocks of a known family. "
        "Lists of modules found: (model): 2 x Linear[]. If the blocks are among them, say so, for "
        "example by backbone=BackboneSpec(blocks='path.to.blocks', d_model=..., "
        "class_tokens='none', head=None) (class_tokens is one of 'none', 'head', 'tail', 'middle', "
        "'double' or a tuple of positions; docs/backbones.md).",
    ),
    "compiled": (
        lambda: svp_peft.apply_svp(torch.compile(VimLike(), backend="eager"), CONFIG),
        "the model is compiled, and compiled graphs take no notice of hooks that come or go: "
        "apply_svp would have no effect on it. Call apply_svp on the model before torch.compile.",
    ),
    "unknown adapter": (
        lambda: svp_peft.set_adapter(patched(), "birds"),
        "there is no adapter 'birds' in this model: its adapters are ['default']. Use one of "
        "these, or add_adapter(model, 'birds') first.",
    ),
    "reserved name": (
        lambda: svp_peft.add_adapter(patched(), "__base__"),
        "adapter name '__base__' is reserved: it stands for the base model without prompts. Choose "
        "another name.",
    ),
    "merge": (
        lambda: svp_peft.merge_and_unload(patched()),
        "SVP cannot be merged into the base weights: its prompts depend on the input through a "
        "SiLU, so no fixed weight equals them. Keep the adapter, or call remove_svp(model) to get "
        "the base model back.",
    ),
    "shuffled tokens": (
        lambda: patched()(torch.randn(1, 3, 16, 16), if_random_token_rank=True),
        "VimLike was called with if_random_token_rank, which SVP cannot follow: shuffled tokens "
        "hide where the class token stands. Leave if_random_token_rank at its default, or call "
        "inside disable_adapter(model).",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_message_says_what_why_and_what_to_do(name):
    provoke, expected = CASES[name]
    with pytest.raises(svp_peft.SVPError) as caught:
        provoke()
    assert str(caught.value) == expected
