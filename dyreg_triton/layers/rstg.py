"""Recurrent space-time graph over region nodes (RSTG, as used by DyReG: Duta et al., equations 8-9)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._core.validation import choice, is_integer, layer_input, positive_int
from ..pretrained import Pretrained
from .leaves import first_readable, tensor_of
from .norms import ChannelAffineNorm, affine, is_affine, standardise
from .recurrence import RECURRENCES, over_time
from .recurrence import recurrence as make_recurrence

AGGREGATIONS = ("dot", "mean")
COMBINATIONS = ("concatenate", "sum")
ORDERS = ("space-time", "time-space")


def _mlp(inputs: int, channels: int, layers: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for i in range(layers):
        parts += [nn.Linear(channels if i else inputs, channels), nn.ReLU()]
    return nn.Sequential(*parts)


class RSTG(Pretrained):
    """Messages between all pairs of nodes of a frame, and a recurrence of each node over time, several times.

    With v_i the nodes of a frame, per iteration:

        m_ij = norm(MLP(v_j, v_i))                  sender j, receiver i; norm joint over (i, j, channels)
        u_i  = ReLU(sum_j softmax_j(q_i . k_j) m_ij + b)     "dot"; equation 8
        u_i  = mean_j m_ij                                   "mean"
        v_i  = norm(update(v_i, u_i))               norm joint over (i, channels)
        v_i  = recurrence over time                          equation 9

    All iterations share their weights. The first layer of the message MLP is linear in its two inputs, so it runs
    once per node and not once per pair; the norm's scale and bias commute with the average, so they act on its result.
    Where a hook, or a forward that is not nn.Linear's, would not see that, each pair is formed and given to it.

    Args:
        channels: channels C of a node.
        iterations: how often messages are passed.
        recurrence: "gru" (the paper) or "lstm" (the published code's default).
        combine: "concatenate" two nodes before an MLP (the paper), or "sum" them (the published default).
        send_layers: 1 or 2 layers of the message MLP.
        update_layers: 0, 1 or 2 layers of the update MLP; 0 adds u_i to v_i and needs combine="sum".
        aggregation: "dot" or "mean".
        order: "space-time" as written above (the paper), or "time-space": the recurrence before the messages, and a
            second recurrence, `external_lstm`, at the end (the published code).

    Shapes: nodes (B, T, N, C) -> (B, T, N, C), any B, T and N.

    Raises ValueError for an argument outside those named, and for nodes of another rank or number of channels.
    """

    def __init__(
        self,
        channels: int,
        *,
        iterations: int = 3,
        recurrence: str = "gru",
        combine: str = "concatenate",
        send_layers: int = 2,
        update_layers: int = 2,
        aggregation: str = "dot",
        order: str = "space-time",
    ):
        super().__init__()
        self.channels = channels = positive_int("RSTG", "channels", channels)
        self.iterations = positive_int("RSTG", "iterations", iterations)
        choice("RSTG", "recurrence", recurrence, RECURRENCES)
        self.combine = choice("RSTG", "combine", combine, COMBINATIONS)
        self.aggregation = choice("RSTG", "aggregation", aggregation, AGGREGATIONS)
        self.order = choice("RSTG", "order", order, ORDERS)
        if not is_integer(send_layers) or send_layers not in (1, 2):
            raise ValueError(f"RSTG: send_layers is {send_layers!r}; accepted are 1 and 2")
        if not is_integer(update_layers) or update_layers not in (0, 1, 2):
            raise ValueError(f"RSTG: update_layers is {update_layers!r}; accepted are 0, 1 and 2")
        if update_layers == 0 and combine == "concatenate":
            raise ValueError("RSTG: update_layers is 0, which adds, with combine 'concatenate'; accepted are 1 and 2")

        inputs = channels if combine == "sum" else 2 * channels
        self.internal_lstm = make_recurrence(recurrence, channels)
        if order == "time-space":
            self.external_lstm = make_recurrence(recurrence, channels)
        self.send_mlp = _mlp(inputs, channels, send_layers)
        self.norm_dict = nn.ModuleDict(
            {
                "send_message_norm": ChannelAffineNorm((channels,), 3),
                "update_norm": ChannelAffineNorm((channels,), 2),
                "before_graph_norm": ChannelAffineNorm((channels,), 2),
            }
        )
        if aggregation == "dot":
            self.att_q = nn.Linear(channels, channels)
            self.att_k = nn.Linear(channels, channels)
            self.att_bias = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.update_mlp = _mlp(inputs, channels, update_layers) if update_layers else nn.Identity()

    def messages(self, nodes: Tensor) -> Tensor:
        """Messages before their normalisation: (B, T, receivers N, senders N, C)."""
        first = first_readable(self.send_mlp, nn.Linear)
        if first is None:
            sender, receiver = nodes.unsqueeze(2), nodes.unsqueeze(3)
            if self.combine == "sum":
                return self.send_mlp(sender + receiver)
            return self.send_mlp(torch.cat(torch.broadcast_tensors(sender, receiver), dim=-1))
        if self.combine == "sum":
            sender = receiver = F.linear(nodes, first.weight)
        else:
            of_sender, of_receiver = first.weight.split(self.channels, dim=1)
            sender, receiver = F.linear(nodes, of_sender), F.linear(nodes, of_receiver)
        if first.bias is not None:
            receiver = receiver + first.bias
        hidden = receiver.unsqueeze(3) + sender.unsqueeze(2)
        return self.send_mlp[1:](hidden)

    def space(self, nodes: Tensor) -> Tensor:
        """One round of messages and updates within each frame."""
        norm = self.norm_dict["send_message_norm"]
        messages = self.messages(nodes)
        late = is_affine(norm)  # scale and bias commute with an average of messages, which is smaller
        messages = standardise(norm, messages, 3) if late else norm(messages)
        if self.aggregation == "dot":
            weights = torch.softmax(self.att_q(nodes) @ self.att_k(nodes).mT, dim=-1).to(messages.dtype)
            received = (weights.unsqueeze(-1) * messages).sum(3)
            received = torch.relu((affine(norm, received) if late else received) + self.att_bias)
        else:
            received = messages.mean(3)
            received = affine(norm, received) if late else received
        both = nodes + received if self.combine == "sum" else torch.cat([nodes, received.to(nodes.dtype)], dim=-1)
        return self.norm_dict["update_norm"](self.update_mlp(both))

    def forward(self, nodes: Tensor) -> Tensor:
        form = f"(B, T, N, {self.channels}) for channels {self.channels}"
        layer_input(
            "RSTG", "nodes", nodes, tensor_of(self.internal_lstm, self), (None, None, None, self.channels), form
        )
        nodes = self.norm_dict["before_graph_norm"](nodes)
        for _ in range(self.iterations):
            if self.order == "time-space":
                nodes = self.space(over_time(self, "internal_lstm", nodes))
            else:
                nodes = over_time(self, "internal_lstm", self.space(nodes))
        return over_time(self, "external_lstm", nodes) if self.order == "time-space" else nodes
