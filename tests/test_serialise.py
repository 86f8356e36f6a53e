"""Safetensors files written without numpy, read by the safetensors library."""

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from svp_peft import serialise
from svp_peft.serialise import assemble, pack

TENSORS = {
    "b": torch.randn(3, 5),
    "a": torch.randn(2, 3).bfloat16(),
    "half": torch.randn(4).half(),
    "double": torch.randn(2, 2, 2).double(),
    "view": torch.arange(12.0).view(3, 4).t()[1:],
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "long": torch.tensor([1, -(2**40)]),
    "int": torch.tensor([1, -2], dtype=torch.int32),
    "short": torch.tensor([1, -2], dtype=torch.int16),
    "char": torch.tensor([1, -2], dtype=torch.int8),
    "byte": torch.tensor([255], dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
}


def test_library_reads_what_was_written(tmp_path):
    data = assemble(*pack(TENSORS), {"format": "pt", "note": "ä"})
    (tmp_path / "file").write_bytes(data)
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ä"}
        assert set(file.keys()) == TENSORS.keys()
        for key, tensor in TENSORS.items():
            assert file.get_tensor(key).dtype == tensor.dtype
            assert torch.equal(file.get_tensor(key), tensor)


def test_every_tensor_starts_at_a_multiple_of_its_elements_size():
    entries, payload = pack(TENSORS)
    for key, entry in entries.items():
        assert entry["data_offsets"][0] % TENSORS[key].element_size() == 0
    header = int.from_bytes(assemble(entries, payload, {})[:8], "little")
    assert header % 8 == 0


def test_order_of_the_dict_does_not_change_the_bytes():
    turned = dict(reversed(TENSORS.items()))
    assert assemble(*pack(turned), {}) == assemble(*pack(TENSORS), {})


def test_bytes_are_little_endian_on_a_big_endian_machine(monkeypatch):
    number = torch.tensor([1, 256], dtype=torch.int32)
    # this machine's order, read as if it were the other
    monkeypatch.setattr(serialise.sys, "byteorder", "big")
    assert pack({"x": number})[1] == bytes([0, 0, 0, 1, 0, 0, 1, 0])


def test_other_dtypes_are_named():
    with pytest.raises(TypeError, match=r"x has dtype torch\.complex64"):
        pack({"x": torch.zeros(1, dtype=torch.complex64)})


def test_saving_and_loading_an_adapter_needs_no_numpy(tmp_path):
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "from svp_peft import load_adapter, save_adapter\n"
        "from tests.tiny import base, trained\n"
        f"save_adapter(trained(), {str(tmp_path)!r})\n"
        f"load_adapter(base(), {str(tmp_path)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
