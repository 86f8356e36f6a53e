"""Bit-exact, version-independent parameter recipe (pure torch, no torch RNG).

torch.randn is NOT used on purpose: its last bits depend on the CPU (AVX2 / scalar Box-Muller
paths differ) and on the torch version.  Here every number comes from a counter-based splitmix64
hash evaluated in int64 (wrap-around) arithmetic, followed only by IEEE + - * / in float64 and one
float64 -> float32 rounding.  It gives the same bits on any torch, any device.

  normal(seed, name, shape)  float64, approx. N(0,1): sum of four 16-bit uniforms (Irwin-Hall 4),
                             |x| <= 3.47
  fill(seed, name, shape)    float32 parameter value, the rule is chosen from the parameter name
  make_state(seed, shapes, scale)   {name: float32 tensor}; shapes = {official name: shape}
"""

import hashlib
import math
import zlib

import torch

_M = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_C1 = 0xBF58476D1CE4E5B9
_C2 = 0x94D049BB133111EB


def _i64(v):
    v &= _M
    return v - (1 << 64) if v >= (1 << 63) else v


def _srl(x, k):  # logical shift right of an int64 tensor
    return (x >> k) & ((1 << (64 - k)) - 1)


def _mix(x):
    x = (x ^ _srl(x, 30)) * _i64(_C1)
    x = (x ^ _srl(x, 27)) * _i64(_C2)
    return x ^ _srl(x, 31)


def _mix_py(v):
    v &= _M
    v = ((v ^ (v >> 30)) * _C1) & _M
    v = ((v ^ (v >> 27)) * _C2) & _M
    return v ^ (v >> 31)


def base_key(seed, name):
    return _mix_py(_mix_py(int(seed) + _GOLDEN) ^ zlib.crc32(name.encode("utf-8")))


def bits(seed, name, n):
    i = torch.arange(1, n + 1, dtype=torch.int64)
    return _mix(i * _i64(_GOLDEN) + _i64(base_key(seed, name)))


def normal(seed, name, shape):
    shape = tuple(int(s) for s in shape)
    n = 1
    for s in shape:
        n *= s
    h = bits(seed, name, n)
    s = (h & 0xFFFF) + (_srl(h, 16) & 0xFFFF) + (_srl(h, 32) & 0xFFFF) + _srl(h, 48)
    return ((s - 131070).to(torch.float64) / 37837.0).reshape(shape)


def _fan_in(shape):
    n = 1
    for s in shape[1:]:
        n *= int(s)
    return n


def _isqrt_scale(fan_in):
    # 1/sqrt(fan_in); IEEE sqrt and division are correctly rounded => exact on every machine
    return 1.0 / math.sqrt(float(fan_in))


def fill(seed, name, shape):
    """float32 value of the official parameter `name` (names as in the official state_dict)."""
    shape = tuple(int(s) for s in shape)
    x = normal(seed, name, shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf in ("A_log", "A_b_log"):  # A = -exp(A_log): about -1 .. -12, jittered
        n = shape[1]
        ramp = torch.arange(n, dtype=torch.float64) * (2.5 / max(n - 1, 1))
        y = x * 0.3 + ramp
    elif leaf in ("D", "D_b"):
        y = x * 0.3 + 1.0
    elif leaf == "gamma":  # init_layer_scale
        y = x * 0.2 + 0.5
    elif leaf in ("prompt_scale", "prompt_shared_scale"):  # official init is 0 (= identity)
        y = x * 0.4
    elif leaf in ("cls_token", "cls_token_head", "cls_token_tail", "pos_embed"):
        y = x * 0.3
    elif ".norm." in name or name.startswith("norm_f.") or name.startswith("norm."):
        y = x * 0.15 + 1.0 if leaf == "weight" else x * 0.1
    elif "conv1d" in name:
        y = x * 0.5 if leaf == "weight" else x * 0.2
    elif "dt_proj" in name:
        y = x * (0.5 * _isqrt_scale(shape[1])) if leaf == "weight" else x * 1.0 - 2.5
    elif leaf == "weight":  # every Linear, patch_embed.proj
        y = x * _isqrt_scale(_fan_in(shape))
    elif leaf == "bias":
        y = x * 0.2
    else:
        raise KeyError(name)
    return y.to(torch.float32)


def make_state(seed, shapes, scale=None):
    """scale: {name: factor}, powers of two (exact in float32)"""
    st = {k: fill(seed, k, v) for k, v in shapes.items()}
    for k, f in (scale or {}).items():
        st[k] = st[k] * f
    return st


def make_input(seed, shape, name="input"):
    return normal(seed, name, shape).to(torch.float32)


def make_cotangent(seed, shape, name="cotangent.logits"):
    return normal(seed, name, shape).to(torch.float32)


def projection(seed, name, grad, k):
    """<grad, r_k> in float64 with r_k = normal(seed, 'proj%d.'+name)."""
    return float((grad.double() * normal(seed, f"proj{k}.{name}", grad.shape)).sum())


def state_sha256(state):
    """sha256 over names, shapes and little-endian float32 bytes, names sorted."""
    h = hashlib.sha256()
    for k in sorted(state):
        t = state[k].detach().to("cpu", torch.float32).contiguous()
        sizes = ",".join(str(int(s)) for s in t.shape)
        h.update(f"{k}|{sizes}|".encode())
        h.update(t.numpy().astype("<f4").tobytes())
    return h.hexdigest()
