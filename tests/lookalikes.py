"""Small look-alikes of the model families, written from their description.

Each reproduces the structure that svp_peft goes by (names of lists and attributes, what a block
takes and returns, where class tokens stand) and the traps of its family, with a cheap stand-in for
the mixer that mixes tokens in both directions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mixer(nn.Module):
    """Mixes tokens: a gated linear map plus running means from both ends."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, inference_params: object = None) -> Tensor:
        u = F.linear(x, self.in_proj.weight)
        steps = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=u.dtype)[:, None]
        forward = u.cumsum(1) / steps
        backward = u.flip(1).cumsum(1).div(steps).flip(1)
        return F.linear(F.silu(u) * (forward + 0.5 * backward), self.out_proj.weight)


class SplitBlock(nn.Module):
    """Vim's block: adds what comes in to the residual, returns (mixer output, residual)."""

    def __init__(self, d_model: int, index: int = 0) -> None:
        super().__init__()
        self.mixer = Mixer(d_model)
        self.norm = nn.LayerNorm(d_model)
        self.layer_idx = index

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: object = None
    ) -> tuple[Tensor, Tensor]:
        residual = hidden_states if residual is None else residual + hidden_states
        normed = self.norm(residual.to(self.norm.weight.dtype))
        return self.mixer(normed, inference_params=inference_params), residual


class VimLike(nn.Module):
    """hustvl/Vim in small: (hidden, residual) blocks, every kind of class token.

    Args:
        class_token: "middle", "head", "double" or "none".
        keywords: call the blocks by keyword.
        delete_cls_token: as the segmentation backbone does: no parameter, but the flag stays on.
    """

    def __init__(
        self,
        class_token: str = "middle",
        *,
        depth: int = 4,
        d_model: int = 16,
        patches: int = 4,
        num_classes: int = 5,
        keywords: bool = False,
        if_bidirectional: bool = False,
        delete_cls_token: bool = False,
    ) -> None:
        super().__init__()
        self.keywords, self.if_bidirectional = keywords, if_bidirectional
        self.if_cls_token = class_token != "none"
        self.use_middle_cls_token = class_token == "middle"
        self.use_double_cls_token = class_token == "double"
        self.flip_img_sequences_ratio = -1.0
        self.embed_dim = d_model
        self.patch_embed = nn.Conv2d(3, d_model, 4, 4)
        self.patch_embed.num_patches = patches * patches  # type: ignore[assignment]
        extra = {"none": 0, "double": 2}.get(class_token, 1)
        self.pos_embed = nn.Parameter(torch.randn(1, patches * patches + extra, d_model) * 0.02)
        if class_token == "double":
            self.cls_token_head = nn.Parameter(torch.randn(1, 1, d_model) * 0.02)
            self.cls_token_tail = nn.Parameter(torch.randn(1, 1, d_model) * 0.02)
        elif class_token != "none":
            self.cls_token = nn.Parameter(torch.randn(1, 1, d_model) * 0.02)
        self.layers = nn.ModuleList(SplitBlock(d_model, index) for index in range(depth))
        self.norm_f = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, num_classes) if num_classes else nn.Identity()
        if delete_cls_token:
            del self.cls_token
            self.pos_embed = nn.Parameter(self.pos_embed.detach()[:, 1:])

    def tokens(self, x: Tensor) -> tuple[Tensor, list[int]]:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        cls = getattr(self, "cls_token", None)
        positions: list[int] = []
        if hasattr(self, "cls_token_head"):
            head, tail = (
                t.expand(len(x), -1, -1) for t in (self.cls_token_head, self.cls_token_tail)
            )
            positions = [0, x.shape[1] + 1]
            x = torch.cat((head, x, tail), 1)
        elif cls is not None:
            position = x.shape[1] // 2 if self.use_middle_cls_token else 0
            positions = [position]
            x = torch.cat((x[:, :position], cls.expand(len(x), -1, -1), x[:, position:]), 1)
        return x + self.pos_embed, positions

    def forward_features(self, x: Tensor, inference_params: object = None) -> Tensor:
        hidden, positions = self.tokens(x)
        residual: Tensor | None = None
        if self.if_bidirectional:
            for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
                h_f, r_f = first(hidden, residual, inference_params=inference_params)
                flipped = None if residual is None else residual.flip([1])
                # one tensor goes to both blocks of a pair: prompting it in place would show here
                h_b, r_b = second(hidden.flip([1]), flipped, inference_params=inference_params)
                hidden, residual = h_f + h_b.flip([1]), r_f + r_b.flip([1])
        else:
            for layer in self.layers:
                if self.keywords:
                    hidden, residual = layer(residual=residual, hidden_states=hidden)
                else:
                    hidden, residual = layer(hidden, residual, inference_params=inference_params)
        x = self.norm_f((hidden + residual).to(self.norm_f.weight.dtype))
        return x[:, positions].mean(1) if positions else x.mean(1)

    def forward(
        self,
        x: Tensor,
        inference_params: object = None,
        if_random_cls_token_position: bool = False,
        if_random_token_rank: bool = False,
    ) -> Tensor:
        return self.head(self.forward_features(x, inference_params))


class ReleasedSvpLike(VimLike):
    """The released SVP model as a plain backbone: no flag, middle class token, returns a pair."""

    def __init__(self) -> None:
        super().__init__()
        del self.if_cls_token, self.use_middle_cls_token, self.use_double_cls_token
        self.transfer_type = "none"

    def tokens(self, x: Tensor) -> tuple[Tensor, list[int]]:
        self.use_middle_cls_token = True
        try:
            return super().tokens(x)
        finally:
            del self.use_middle_cls_token

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        features = self.forward_features(x)
        return self.head(features), features


class CheckpointedBlock(SplitBlock):
    """VideoMamba's block: one more keyword."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: object = None,
        use_checkpoint: bool = False,
    ) -> tuple[Tensor, Tensor]:
        return super().forward(hidden_states, residual, inference_params)


class VideoMambaLike(nn.Module):
    """VideoMamba: class token first and no flag about it; images or clips (batch, 3, T, H, W)."""

    def __init__(self, frames: int = 0, d_model: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.frames = frames
        self.embed_dim = d_model
        self.patch_embed = nn.Conv2d(3, d_model, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, d_model) * 0.02)
        self.layers = nn.ModuleList(CheckpointedBlock(d_model, i) for i in range(depth))
        self.norm_f = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        if self.frames:
            x = x.transpose(1, 2).flatten(0, 1)
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = x.reshape(batch, -1, x.shape[-1])
        hidden = torch.cat((self.cls_token.expand(batch, -1, -1), x), 1)
        residual = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=None, use_checkpoint=False)
        return self.head(self.norm_f(hidden + residual)[:, 0])


class MambaRegLike(nn.Module):
    """Mamba-Reg: registers spread evenly, at `cls_positions`, a plain tensor."""

    def __init__(self, registers: int = 3, patches: int = 16, d_model: int = 16) -> None:
        super().__init__()
        self.embed_dim = d_model
        self.patch_embed = nn.Conv2d(3, d_model, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, registers, d_model) * 0.02)
        every = patches // (registers + 1)
        self.cls_positions = torch.arange(every, every * (registers + 1) + registers, every + 1)
        order, image = [], iter(range(patches))
        register = iter(range(patches, patches + registers))
        for position in range(patches + registers):
            special = position in self.cls_positions.tolist()
            order.append(next(register) if special else next(image))
        self.token_idx = torch.tensor(order)
        self.layers = nn.ModuleList(SplitBlock(d_model, i) for i in range(4))
        self.norm_f = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model * registers, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((x, self.cls_token.expand(len(x), -1, -1)), 1)[:, self.token_idx]
        hidden, residual = x, None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=None)
        return self.head(self.norm_f(hidden + residual)[:, self.cls_positions].flatten(1))


class LocalVimLike(VimLike):
    """LocalVim: writes into its blocks' mixers, and keeps outputs of blocks without a copy."""

    def __init__(self, class_token: str = "none") -> None:
        super().__init__(class_token)
        for layer in self.layers:
            layer.mixer.multi_scan = nn.Module()

    def features(self, x: Tensor) -> list[Tensor]:
        hidden, _ = self.tokens(x)
        residual, outs = None, []
        for layer in self.layers:
            layer.mixer.multi_scan.token_size = (4, 4)
            hidden, residual = layer(hidden, residual, inference_params=None)
            # prompting the next block's input in place would change what is kept here
            outs.append(hidden)
        return outs


class StreamBlock(nn.Module):
    """ARM's block: Vim's signature, but the whole stream comes in and goes out as one tensor."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.mixer = Mixer(d_model)
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.mlp = nn.Linear(d_model, d_model)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: object = None
    ) -> Tensor:
        hidden_states = hidden_states + self.mixer(self.norm1(hidden_states))
        return hidden_states + self.mlp(self.norm2(hidden_states))


class ArmLike(nn.Module):
    """ARM: a middle class token whatever `use_middle_cls_token` says."""

    def __init__(self, d_model: int = 16) -> None:
        super().__init__()
        self.if_cls_token, self.use_middle_cls_token = True, False
        self.patch_embed = nn.Conv2d(3, d_model, 4, 4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, d_model) * 0.02)
        self.layers = nn.ModuleList(StreamBlock(d_model) for _ in range(3))
        self.norm_f = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        middle = x.shape[1] // 2
        x = torch.cat((x[:, :middle], self.cls_token.expand(len(x), -1, -1), x[:, middle:]), 1)
        for layer in self.layers:
            x = layer(x, inference_params=None)
        return self.head(self.norm_f(x)[:, middle])


class PlainMambaLayer(nn.Module):
    """PlainMamba's layer: needs the size of the grid beside the tokens."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.mamba = Mixer(d_model)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        assert x.shape[1] == hw_shape[0] * hw_shape[1]
        return x + self.mamba(self.norm(x))


class PlainMambaLike(nn.Module):
    """PlainMamba: no class token, no head of its own, returns tokens and feature maps."""

    def __init__(self, d_model: int = 16) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, d_model, 4, 4)
        self.layers = nn.ModuleList(PlainMambaLayer(d_model) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = self.patch_embed(x)
        size = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, hw_shape=size)
        return x, (x.transpose(1, 2).unflatten(2, size),)


class Classifier(nn.Module):
    """A framework's classifier: the backbone under `backbone`, the head beside it."""

    def __init__(self, backbone: nn.Module, d_model: int = 16) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(d_model, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)[0].mean(1))


class MambaPeftLike(nn.Module):
    """MambaPEFT's wrapper: forwards attributes, and gives blocks a forward with more keywords."""

    def __init__(self, module: nn.Module, prompts: int = 0) -> None:
        super().__init__()
        self.module = module
        if prompts:
            module.prompt_encoder = nn.Embedding(prompts, module.embed_dim)
            module.prompt_type = "prefix"
        for layer in module.layers:
            layer.forward = _PeftForward(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class _PeftForward:
    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: object = None,
        **peft_kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        return type(self.block).forward(self.block, hidden_states, residual, inference_params)


class MixerModelLike(nn.Module):
    """Stock mamba-ssm's MixerModel: token ids in, no class token, no head."""

    def __init__(self, d_model: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, d_model)
        self.layers = nn.ModuleList(SplitBlock(d_model, i) for i in range(3))
        self.norm_f = nn.LayerNorm(d_model)

    def forward(
        self, ids: Tensor, inference_params: object = None, **mixer_kwargs: object
    ) -> Tensor:
        hidden, residual = self.embedding(ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=inference_params)
        return self.norm_f(hidden + residual)


class MapBlock(nn.Module):
    """VMamba's block on feature maps, channels last or first."""

    def __init__(self, d_model: int, channel_first: bool, ssm: bool = True) -> None:
        super().__init__()
        self.channel_first = channel_first
        if ssm:
            self.norm = nn.LayerNorm(d_model)
            self.op = Mixer(d_model)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(self, input: Tensor) -> Tensor:
        x = input.movedim(1, -1) if self.channel_first else input
        if hasattr(self, "op"):
            mixed = self.op(self.norm(x).flatten(1, 2)).reshape(x.shape)
            x = x + mixed
        return x.movedim(-1, 1) if self.channel_first else x


class Permute(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(*self.order)


class VMambaLike(nn.Module):
    """VMamba: stages of growing width; `convolutions` makes the last stage one of EfficientVMamba.

    Middle stages hold one block without SSM branch, as `ssm_ratio=0` gives.
    """

    def __init__(self, channel_first: bool = False, convolutions: bool = False) -> None:
        super().__init__()
        self.channel_first = channel_first
        self.patch_embed = nn.Conv2d(3, 8, 2, 2)
        self.layers = nn.ModuleList()
        for width, depth in ((8, 2), (16, 3)):
            blocks = [MapBlock(width, channel_first, ssm=index != 1) for index in range(depth)]
            down = nn.Conv2d(width, 2 * width, 2, 2)
            to, back = Permute(0, 3, 1, 2), Permute(0, 2, 3, 1)
            downsample = down if channel_first else nn.Sequential(to, down, back)
            stage = nn.Sequential()
            stage.add_module("blocks", nn.Sequential(*blocks))
            stage.add_module("downsample", downsample)
            self.layers.append(stage)
        if convolutions:
            to, back = Permute(0, 3, 1, 2), Permute(0, 2, 3, 1)
            self.layers.append(nn.Sequential(to, nn.Conv2d(32, 32, 3, padding=1), back))
        self.classifier = nn.Sequential()
        self.classifier.add_module("norm", nn.LayerNorm(32))
        self.classifier.add_module("head", nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        x = x if self.channel_first else x.movedim(1, -1)
        for layer in self.layers:
            x = layer(x)
        x = x.movedim(1, -1) if self.channel_first else x
        return self.classifier(x.mean((1, 2)))


class WindowBlock(nn.Module):
    """MambaVision's block: windows (batch * windows, size * size, C)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(d_model), Mixer(d_model)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm1(x))


class MambaVisionLike(nn.Module):
    """MambaVision: a stage of convolutions, then stages of blocks on windows of 2 x 2 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 2, 2)
        self.levels = nn.ModuleList(nn.Module() for _ in range(3))
        self.levels[0].blocks = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1)])
        self.levels[1].blocks = nn.ModuleList(WindowBlock(8) for _ in range(2))
        self.levels[2].blocks = nn.ModuleList(WindowBlock(16) for _ in range(2))
        self.downsample = nn.Conv2d(8, 16, 2, 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.levels[0].blocks[0](self.patch_embed(x))
        x = self.downsample(self.windows(self.levels[1].blocks, x))
        return self.head(self.windows(self.levels[2].blocks, x).mean((2, 3)))

    def windows(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        batch, width, height, _ = x.shape
        n = height // 2
        x = x.view(batch, width, n, 2, n, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, width)
        for block in blocks:
            x = block(x)
        x = x.reshape(batch, n, n, 2, 2, width).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, width, height, height)
