"""The benchmark of scans alone calls every other package rightly: each is held to the reference."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.ops.mamba_lookalikes import write_mamba_ssm

ROOT = Path(__file__).parents[1]

# computes on a CPU what VMamba's compiled module computes on a GPU, with its signature: directions
# are groups of channels, out_float asks for a float32 result, and the states are of no use here
_OFLEX = """
import torch
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

def _scan(u, delta, A, B, C, D, bias, softplus):
    groups = zip(*(t.chunk(B.shape[1], 1) for t in (u, delta)), *(t.unbind(1) for t in (B, C)),
                 *(t.chunk(B.shape[1], 0) for t in (A, D, bias)))
    return torch.cat([selective_scan_fn(u, d, A, B, C, D, None, b, softplus)
                      for u, d, B, C, A, D, b in groups], 1)

def fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows, out_float):
    assert out_float and nrows == 1
    assert u.shape[1] == A.shape[0] == B.shape[1] * (u.shape[1] // B.shape[1])
    out = _scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
    return out.float(), torch.zeros(1)

def bwd(u, delta, A, B, C, D, delta_bias, dout, x, delta_softplus, nrows):
    inputs = [t.detach().requires_grad_() for t in (u, delta, A, B, C, D, delta_bias)]
    with torch.enable_grad():
        return torch.autograd.grad(_scan(*inputs, delta_softplus), inputs, dout.to(u.dtype))
"""

# x_t = gate_t x_(t-1) + token_t over a power of two of tokens
_REF = """
import torch

def scan(gates, tokens):
    assert gates.is_contiguous() and tokens.is_contiguous()
    length = tokens.shape[2]
    assert length >= 32 and length & (length - 1) == 0
    x, states = torch.zeros_like(tokens[..., 0]), []
    for t in range(length):
        x = gates[..., t] * x + tokens[..., t]
        states.append(x)
    return torch.stack(states, -1)
"""


def test_every_contender_computes_the_same_scan(tmp_path):
    write_mamba_ssm(tmp_path)
    (tmp_path / "selective_scan_cuda_oflex.py").write_text(_OFLEX)
    (tmp_path / "accelerated_scan").mkdir()
    (tmp_path / "accelerated_scan" / "__init__.py").write_text("")
    (tmp_path / "accelerated_scan" / "ref.py").write_text(_REF)
    command = [sys.executable, str(ROOT / "examples/benchmarks/scan_kernels.py"), "--device=cpu"]
    sizes = ["--batch=2", "--length=37", "--channels=6", "--states=4", "--repeats=1"]
    done = subprocess.run(
        [*command, *sizes, f"--output={tmp_path / 'rows.json'}"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {row["what"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert set(rows) == {
        "svp_peft, cpu", "svp_peft, reference", "mamba_ssm", "vmamba", "accelerated_scan, ref"
    }, done.stdout  # fmt: skip
    for row in rows.values():
        assert row["error"] < 2e-6, row  # float32 against float64
        assert row["both_ms"] > 0, row


def test_packages_that_are_missing_are_named(tmp_path):
    command = [sys.executable, str(ROOT / "examples/benchmarks/scan_kernels.py"), "--device=cpu"]
    sizes = ["--batch=1", "--length=3", "--channels=2", "--states=2", "--repeats=1"]
    done = subprocess.run(
        [*command, *sizes],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "vmamba: left out: No module named 'selective_scan_cuda_oflex'" in done.stdout
