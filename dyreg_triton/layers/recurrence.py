"""One recurrent network over time, shared by all nodes."""

from __future__ import annotations

from torch import Tensor, nn

from .._core.autocast import lowered

RECURRENCES = ("gru", "lstm")


def recurrence(kind: str, channels: int) -> nn.RNNBase:
    """nn.GRU or nn.LSTM of `channels` inputs and outputs, batch first."""
    return (nn.GRU if kind == "gru" else nn.LSTM)(channels, channels, batch_first=True)


def over_time(layer: nn.Module, name: str, nodes: Tensor) -> Tensor:
    """Run the layer's recurrence of that name along T of nodes (B, T, N, C), each node a sequence of its own."""
    rnn: nn.Module = getattr(layer, name)
    if nodes.numel() == 0:  # torch's recurrences refuse an empty batch; gradients are 0 and not absent, as DDP needs
        here = (weight for weight in rnn.parameters() if weight.device == nodes.device)  # others were offloaded
        return sum((weight.sum().to(nodes.dtype) * 0 for weight in here), nodes)
    sequences = nodes.transpose(1, 2).flatten(0, 1)
    # as autocast does inside, where torch's way for a CPU without AVX-512 then fails; it may be inside of a wrapper
    if any(isinstance(part, nn.LSTM) for part in rnn.modules()):
        sequences = lowered(sequences)
    found = rnn(sequences)
    if not isinstance(found, tuple):
        raise TypeError(
            f"{type(layer).__name__}: {name} is a {type(rnn).__name__}, which returned a {type(found).__name__}; "
            "accepted is what returns outputs and a state, as nn.GRU and nn.LSTM do"
        )
    return found[0].unflatten(0, (nodes.shape[0], nodes.shape[2])).transpose(1, 2)
