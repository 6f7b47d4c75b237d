"""The published blocks for images, of the same class names as those for clips, in `published.py`."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
from published import Bottleneck, enlarged
from torch import Tensor, nn
from torch.nn import functional as F


class NonLocalModule(nn.Module):
    """What the blocks share: how the authors' networks start them."""

    def __init__(self, in_channels: int, **ignored: Any):
        super().__init__()

    def init_modules(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)


class NonLocal(NonLocalModule):
    """(B, C, H, W) -> the same, residual included."""

    def __init__(self, inplanes: int, use_scale: bool = True, **ignored: Any):
        super().__init__(inplanes)
        self.use_scale = use_scale
        inner = inplanes // 2
        self.t, self.p, self.g = (nn.Conv2d(inplanes, inner, 1) for _ in range(3))
        self.softmax = nn.Softmax(dim=2)
        self.z = nn.Conv2d(inner, inplanes, 1)
        self.bn = nn.BatchNorm2d(inplanes)

    def forward(self, x: Tensor) -> Tensor:
        t, p, g = self.t(x).flatten(2), self.p(x).flatten(2), self.g(x).flatten(2)
        scores = t.mT @ p
        if self.use_scale:
            scores = scores / math.sqrt(t.shape[1])
        y = g @ self.softmax(scores).mT
        return self.bn(self.z(y.unflatten(2, x.shape[2:]))) + x


def _pointwise(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class BATransform(nn.Module):
    """(B, C, H, W) -> the same, for square maps of a multiple of s."""

    def __init__(self, in_channels: int, s: int, k: int):
        super().__init__()
        self.s, self.k, self.in_channels = s, k, in_channels
        self.conv1 = _pointwise(in_channels, k)
        self.conv_p = nn.Conv2d(k, k * s**2, (s, 1))
        self.conv_q = nn.Conv2d(k, k * s**2, (1, s))
        self.conv2 = _pointwise(in_channels, in_channels)

    def weights(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """From logits to P and Q."""
        p, q = torch.sigmoid(rows), torch.sigmoid(columns)
        return p / p.sum(-1, keepdim=True), q / q.sum(-2, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        form = (len(x), self.k, self.s, self.s)
        out = self.conv1(x)
        rows = self.conv_p(F.adaptive_max_pool2d(out, (self.s, 1))).view(form)
        columns = self.conv_q(F.adaptive_max_pool2d(out, (1, self.s))).view(form)
        times = x.shape[2] // self.s  # of both axes
        p, q = (enlarged(m, times)[:, :, None] for m in self.weights(rows, columns))
        return self.conv2((p @ x.unflatten(1, (self.k, -1)) @ q).flatten(1, 2))


class BATBlock(NonLocalModule):
    """(B, C, H, W) -> the same, residual included."""

    def __init__(self, in_channels: int, r: int = 2, s: int = 4, k: int = 4, dropout: float = 0.2, **ignored: Any):
        super().__init__(in_channels)
        inner = in_channels // r
        self.conv1 = _pointwise(in_channels, inner)
        self.batransform = BATransform(inner, s, k)
        self.conv2 = _pointwise(inner, in_channels)
        self.dropout = nn.Dropout2d(dropout)

    def init_modules(self) -> None:
        for module in self.modules():  # biases of convolutions stay
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.conv2(self.batransform(self.conv1(x))))


class ImageNet(nn.Module):
    """Images (B, 3, H, W) -> scores (B, classes): blocks between bottlenecks."""

    def __init__(self, channels: int = 8, classes: int = 4, dropout: float = 0.0, **bat: Any):
        super().__init__()
        bat = {"s": 3, "k": 2, "dropout": dropout, **bat}

        def bottleneck() -> Bottleneck:
            return Bottleneck(channels, nn.Conv2d(channels, channels, 3, padding=1, bias=False), 2)

        self.conv1 = nn.Conv2d(3, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.layer2 = nn.Sequential(OrderedDict(block0=bottleneck(), nl0=BATBlock(channels, **bat)))
        self.layer3 = nn.Sequential(OrderedDict(block0=bottleneck(), nl0=NonLocal(channels)))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))
