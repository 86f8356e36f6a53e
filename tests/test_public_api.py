"""The public list, and what importing it costs."""

import inspect
import subprocess
import sys

import svp_peft

HEAVY = {"triton", "mamba_ssm", "causal_conv1d", "huggingface_hub", "timm", "matplotlib", "peft"}


def loaded_after(statement: str, candidates: set[str]) -> set[str]:
    """Names in `candidates` that a fresh interpreter has imported after `statement`."""
    code = f"import sys; {statement}; print(*({candidates!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_is_cheap():
    assert loaded_after("import svp_peft", HEAVY) == set()


def test_the_check_above_can_fail():
    assert loaded_after("import svp_peft, huggingface_hub", HEAVY) == {"huggingface_hub"}


def test_every_public_name_exists_and_is_documented():
    for name in svp_peft.__all__:
        value = getattr(svp_peft, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name} has no docstring"


def test_the_contract_is_public():
    contract = """
        SVPConfig apply_svp remove_svp disable_adapter add_adapter set_adapter delete_adapter
        list_adapters get_model_status print_trainable_parameters hotswap_adapter route
        save_adapter load_adapter push_to_hub convert_svp_checkpoint VisionMamba load_vim
        BackboneSpec SVPError set_backend
    """.split()
    assert set(contract) <= set(svp_peft.__all__)
