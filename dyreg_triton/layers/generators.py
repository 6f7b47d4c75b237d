"""From a feature map to one latent vector per node (DyReG, Duta et al., equations 1-2 and appendix A)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .leaves import readable
from .norms import ChannelAffineNorm


def _map_norm(channels: int) -> ChannelAffineNorm:
    return ChannelAffineNorm((1, channels, 1, 1), 3)


def _plan(side: int) -> tuple[int, int, int, int, int]:
    """For a map side: pooling first (1 or 2), then stride and padding of the two convolutions.

    The sides that the published code knows are planned as it does; every other side as its neighbours.
    """
    if side > 20:
        return (2 if side > 50 else 1), 2, 0, 2, 0
    return (1, 2, 0, 1, 1) if side > 10 else (1, 1, 0, 1, 1)


def _pair(values: Iterable[int]) -> tuple[int, int]:
    rows, columns = values
    return rows, columns


def _convolved(side: int, stride: int, padding: int) -> int:
    return (side + 2 * padding - 3) // stride + 1


class Fishnet(nn.Module):
    """f: 1x1 convolution, two strided 3x3 convolutions, one transposed, one more; each conv, ReLU, norm.

    The transposed convolution's output is added to the first strided one's. (BT, C, H, W) -> (BT, 16, H', W') with
    (H', W') = `self.size`. Any map of at least 3 x 3.
    """

    def __init__(self, in_channels: int, size: tuple[int, int]):
        super().__init__()
        plans = [_plan(side) for side in size]
        self.pooling = _pair(p[0] for p in plans)
        strides = [_pair(p[1] for p in plans), _pair(p[3] for p in plans)]
        paddings = [_pair(p[2] for p in plans), _pair(p[4] for p in plans)]
        sides = [_pair(side // pool for side, pool in zip(size, self.pooling, strict=True))]
        for stride, padding in zip(strides, paddings, strict=True):
            sides.append(_pair(map(_convolved, sides[-1], stride, padding)))
        self.size = sides[2]
        # what a transposed convolution of this stride leaves out of a side that does not divide evenly
        rest = _pair(
            want - ((have - 1) * s + 3 - 2 * p)
            for want, have, s, p in zip(sides[1], sides[2], strides[1], paddings[1], strict=True)
        )
        self.conv1 = nn.Conv2d(in_channels, 32, 1)
        self.tail_conv = nn.ModuleList(
            [
                nn.Conv2d(32, 32, 3, strides[0], paddings[0]),
                nn.Conv2d(32, 16, 3, strides[1], paddings[1]),
            ]
        )
        self.body_trans_conv = nn.ModuleList([nn.ConvTranspose2d(16, 32, 3, strides[1], paddings[1], rest)])
        self.head_conv = nn.ModuleList([nn.Conv2d(32, 16, 3, strides[1], paddings[1])])
        self.norm_dict = nn.ModuleDict(
            {
                "norm1": _map_norm(32),
                "tail_norm_0": _map_norm(32),
                "tail_norm_1": _map_norm(16),
                "body_trans_norm_0": _map_norm(32),
                "head_norm_0": _map_norm(16),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm_dict
        x = F.relu(self.conv1(x))
        if self.pooling != (1, 1):
            x = F.max_pool2d(x, self.pooling)
        x = norm["norm1"](x)
        first = norm["tail_norm_0"](F.relu(self.tail_conv[0](x)))
        x = norm["tail_norm_1"](F.relu(self.tail_conv[1](first)))
        x = norm["body_trans_norm_0"](F.relu(self.body_trans_conv[0](x))) + first
        return norm["head_norm_0"](F.relu(self.head_conv[0](x)))


def sinusoidal_positions(channels: int, size: tuple[int, int]) -> Tensor:
    """(channels, H, W): the first half of the channels tells rows, the second columns, positions in [0, 1].

    Within a half, sines of the even frequencies come before cosines of the odd ones; frequency i is 10000^(-i / half).
    On torch's default device, in its default dtype, but not below float32.
    """
    halves = []
    like: dict[str, Any] = {"dtype": torch.promote_types(torch.get_default_dtype(), torch.float32), "device": None}
    for side, half in zip(size, ((channels + 1) // 2, channels // 2), strict=True):
        position = torch.linspace(0, 1, side, **like)[:, None]
        period = torch.pow(10000, torch.arange(half, **like) / max(half, 1))
        halves.append(torch.cat([torch.sin(position / period[0::2]), torch.cos(position / period[1::2])], dim=1).T)
    rows = halves[0][:, :, None].expand(-1, -1, size[1])
    columns = halves[1][:, None, :].expand(-1, size[0], -1)
    return torch.cat([rows, columns], dim=0)


def node_weights(scores: Tensor, over: str) -> Tensor:
    """Weights of every location for every node, from scores (BT, N, ...) of a 1x1 convolution, float32 or wider.

    Softmax over "locations" makes a node an average over the map (the paper); over "nodes" it gives each location's
    features away in shares, and a node is a sum (the published code).
    """
    flat = scores.flatten(2).to(torch.promote_types(scores.dtype, torch.float32))
    return torch.softmax(flat, dim=1 if over == "nodes" else 2).unflatten(2, scores.shape[2:])


class GloRe(nn.Module):
    """g, small: weighted pooling of the map with sinusoidal positions; (BT, C, H, W) -> (BT, N, D).

    `weights_over`: see `node_weights`.
    """

    pos_emb_buf: Tensor

    def __init__(self, in_channels: int, size: tuple[int, int], nodes: int, channels: int, weights_over: str):
        super().__init__()
        self.weights_over = weights_over
        self.mask_conv = nn.Conv2d(in_channels, nodes, 1)
        self.update = nn.Conv1d(in_channels, channels, 1)
        self.sin_pos_emb_proj = nn.Conv2d(in_channels, in_channels, 1)
        self.register_buffer("pos_emb_buf", sinusoidal_positions(in_channels, size))

    def forward(self, x: Tensor) -> Tensor:
        weights = node_weights(self.mask_conv(x), self.weights_over).flatten(2).to(x.dtype)
        positions = self.sin_pos_emb_proj(self.pos_emb_buf.to(x.dtype)[None])
        pooled = weights @ (x + positions.to(x.dtype)).flatten(2).mT
        update = readable(self.update, nn.Conv1d)
        if update is None:
            return self.update(pooled.mT).mT
        return F.linear(pooled, update.weight.squeeze(-1), update.bias)
