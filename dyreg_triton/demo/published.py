"""DyReG's branch as it is published, written plainly, for comparison: dense kernels and all pairs of nodes.

It borrows a layer's parameters, its generator of regions and its recurrence, so both must give the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers.dyreg import DynamicGraph
from ..layers.recurrence import over_time
from ..layers.rstg import RSTG


def kernel(regions: Tensor, size: tuple[int, int], profile: str, temperature: float) -> Tensor:
    """(B, T, N, H, W): an outer product divided by its sum."""
    axes = []
    for axis, length in enumerate(size[::-1]):
        d = (regions[..., axis, None] - torch.arange(length, device=regions.device, dtype=torch.int64)).abs()
        s = regions[..., axis + 2, None]
        if profile == "gaussian":
            axes.append(torch.exp(-(d**2) / (2 * s**2)))
        else:
            linear = F.relu(s - d)
            axes.append(linear if profile == "linear" else torch.log(1 + temperature * linear))
    across, down = axes
    outer = down.unsqueeze(-1) * across.unsqueeze(-2)
    return outer / (outer.sum((-2, -1), keepdim=True) + 1e-37)


def messages(graph: RSTG, nodes: Tensor) -> Tensor:
    """One round: an MLP on every pair of nodes, a norm over all of them, and a weighted sum over senders."""
    count = nodes.shape[2]
    receiver = nodes.unsqueeze(3).repeat(1, 1, 1, count, 1)
    sender = nodes.unsqueeze(2).repeat(1, 1, count, 1, 1)
    pairs = sender + receiver if graph.combine == "sum" else torch.cat([sender, receiver], dim=-1)
    normed = graph.norm_dict["send_message_norm"](graph.send_mlp(pairs))
    weights = torch.softmax(graph.att_q(nodes) @ graph.att_k(nodes).mT, dim=-1)
    received = F.relu((weights.unsqueeze(-1) * normed).sum(dim=3) + graph.att_bias)
    both = nodes + received if graph.combine == "sum" else torch.cat([nodes, received], dim=-1)
    return graph.norm_dict["update_norm"](graph.update_mlp(both))


def branch(layer: DynamicGraph, x: Tensor) -> Tensor:
    """What `layer(x)[0]` computes, for one without projection whose graph sends before it remembers."""
    dense = kernel(layer.regions(x), layer.size, layer.profile, layer.temperature).flatten(-2)
    nodes = dense @ x.flatten(-2).mT + layer.kernel_projection1(dense)
    graph = layer.rstg
    nodes = graph.norm_dict["before_graph_norm"](nodes)
    for _ in range(graph.iterations):
        nodes = over_time(graph, "internal_lstm", messages(graph, nodes))
    return (nodes.mT @ dense).unflatten(-1, layer.size)
