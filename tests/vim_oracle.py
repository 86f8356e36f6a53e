"""A second Vim, written as plainly as possible, to hold the first one against.

One function over a state_dict: every direction is a Python loop over tokens, the backward one works
on flipped tensors, nothing is fused or shared with the library. In double precision it must give
the same numbers as `VisionMamba` for every combination of constructor arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def logits(state: State, image: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What the model of `arguments` returns in evaluation mode."""
    a = arguments
    tokens, positions = embed(state, image, a)
    flip = a.get("flip_img_sequences_ratio", -1) >= 2
    if flip:
        tokens = tokens.flip(1)

    def rope(x: Tensor | None) -> Tensor | None:
        if x is None or not a.get("if_rope"):
            return x
        return rotate(state, x.flip(1)).flip(1) if flip else rotate(state, x)

    hidden, residual = tokens, None
    depth = a["depth"]
    if a.get("if_bidirectional"):
        for index in range(0, depth - depth % 2, 2):
            # hustvl/Vim does not undo the flip here
            hidden = rotate(state, hidden) if a.get("if_rope") else hidden
            if residual is not None and a.get("if_rope") and a.get("if_rope_residual"):
                residual = rotate(state, residual)
            h1, r1 = block(state, index, hidden, residual, a)
            reverse = None if residual is None else residual.flip(1)
            h2, r2 = block(state, index + 1, hidden.flip(1), reverse, a)
            hidden, residual = h1 + h2.flip(1), r1 + r2.flip(1)
    else:
        for index in range(depth):
            hidden = rope(hidden)
            residual = rope(residual) if a.get("if_rope_residual") else residual
            hidden, residual = block(state, index, hidden, residual, a)
    total = hidden if residual is None else hidden + residual
    total = norm(state, "norm_f", total, a)
    features = pool(total, positions, a.get("final_pool_type", "none"))
    out = F.linear(features, state["head.weight"], state["head.bias"])
    return out.max(1)[0] if a.get("final_pool_type") == "max" else out


def embed(state: State, image: Tensor, a: dict[str, Any]) -> tuple[Tensor, list[int]]:
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    tokens = F.conv2d(image, weight, bias, stride=a["stride"]).flatten(2).transpose(1, 2)
    batch, count, width = tokens.shape
    rows = list(tokens.unbind(1))
    positions: list[int] = []
    if a.get("if_cls_token", True):
        if a.get("use_double_cls_token"):
            rows.insert(0, state["cls_token_head"][0].expand(batch, width))
            rows.append(state["cls_token_tail"][0].expand(batch, width))
            positions = [0, count + 1]
        else:
            positions = [count // 2 if a.get("use_middle_cls_token", True) else 0]
            rows.insert(positions[0], state["cls_token"][0].expand(batch, width))
    tokens = torch.stack(rows, 1)
    if a.get("if_abs_pos_embed", True):
        tokens = tokens + state["pos_embed"]
    return tokens, positions


def rotate(state: State, x: Tensor) -> Tensor:
    cos, sin = state["rope.freqs_cos"], state["rope.freqs_sin"]
    rows = []
    first = x.shape[1] - cos.shape[0]
    for t in range(x.shape[1]):
        if t < first:
            rows.append(x[:, t])
            continue
        even, odd = x[:, t, 0::2], x[:, t, 1::2]
        c, s = cos[t - first], sin[t - first]
        both = torch.stack((even * c[0::2] - odd * s[0::2], odd * c[1::2] + even * s[1::2]), -1)
        rows.append(both.flatten(-2))
    return torch.stack(rows, 1)


def norm(state: State, name: str, x: Tensor, a: dict[str, Any]) -> Tensor:
    eps = a.get("norm_epsilon", 1e-5)
    weight = state[f"{name}.weight"]
    if a.get("rms_norm", True):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
    return F.layer_norm(x, x.shape[-1:], weight, state[f"{name}.bias"], eps)


def block(
    state: State, index: int, hidden: Tensor, residual: Tensor | None, a: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    residual = hidden if residual is None else residual + hidden
    x = norm(state, f"layers.{index}.norm", residual, a)
    return mixer({k.split("mixer.")[1]: v for k, v in state.items()
                  if k.startswith(f"layers.{index}.mixer.")}, x, a), residual  # fmt: skip


def mixer(s: State, x: Tensor, a: dict[str, Any]) -> Tensor:
    xz = F.linear(x, s["in_proj.weight"], s.get("in_proj.bias"))
    kind = "v1" if a.get("if_bimamba") else a.get("bimamba_type", "v2")
    out = scan(s, convolve(s, xz, ""), xz, "", s["A_log"])
    if kind == "v1":
        # the backward scan reads what the forward convolution made
        u = convolve(s, xz, "").flip(1)
        out = out + scan(s, u, xz.flip(1), "", s["A_b_log"]).flip(1)
    elif kind == "v2":
        u = convolve(s, xz.flip(1), "_b")
        out = out + scan(s, u, xz.flip(1), "_b", s["A_b_log"]).flip(1)
    if kind == "v2" and a.get("if_divide_out", True):
        out = out / 2
    out = F.linear(out, s["out_proj.weight"], s.get("out_proj.bias"))
    return out * s["gamma"] if "gamma" in s else out


def convolve(s: State, xz: Tensor, own: str) -> Tensor:
    x, _ = xz.chunk(2, -1)
    taps, bias = s[f"conv1d{own}.weight"], s.get(f"conv1d{own}.bias")
    width = taps.shape[-1]
    conv = F.conv1d(x.transpose(1, 2), taps, bias, padding=width - 1, groups=x.shape[-1])
    return F.silu(conv[..., : x.shape[1]].transpose(1, 2))


def scan(s: State, u: Tensor, xz: Tensor, own: str, A_log: Tensor) -> Tensor:
    _, z = xz.chunk(2, -1)
    low = F.linear(u, s[f"x_proj{own}.weight"])
    rank, size = s[f"dt_proj{own}.weight"].shape[1], A_log.shape[1]
    dt, B, C = low.split((rank, size, size), -1)
    dt = F.softplus(F.linear(dt, s[f"dt_proj{own}.weight"], s[f"dt_proj{own}.bias"]))
    A = -A_log.exp()
    h = torch.zeros(*u.shape[:1], *A.shape, dtype=u.dtype)
    rows = []
    for t in range(u.shape[1]):
        step = dt[:, t, :, None]
        h = (step * A).exp() * h + step * B[:, t, None, :] * u[:, t, :, None]
        rows.append((h * C[:, t, None, :]).sum(-1) + s[f"D{own}"] * u[:, t])
    return torch.stack(rows, 1) * F.silu(z)


def pool(tokens: Tensor, positions: list[int], kind: str) -> Tensor:
    if positions:
        return sum(tokens[:, p] for p in positions) / len(positions)
    if kind == "none":
        return tokens[:, -1]
    return tokens.mean(1) if kind == "mean" else tokens
