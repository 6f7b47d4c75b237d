"""What a tuned call is in terms of kernels, of the testing kit, and of tensors on a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..configs.keys import Key
from ..ops.recording import TunedCall
from ..ops.table import OPS


def keys_of(call: TunedCall, family: str) -> list[Key]:
    """The keys of the kernels that a call launches, in order."""
    return OPS[call.op].keys(call, family)


def case_of(call: TunedCall, most: int | None = None) -> Any:
    """The `dt.testing` case of a call, of at most so many frames or clips."""
    from ..testing.bilinear import BilinearCase
    from ..testing.regions import RegionCase
    from ..testing.relational import RelationalCase

    layouts = {
        name: "aligned" if spec["layout"] == "contiguous" else spec["layout"] for name, spec in call.tensors.items()
    }
    if call.op == "relational_attention":
        clips, queries, c, t, h, w = call.shape("q")
        kernel = "V+R" if {"h1", "p1"} <= set(call.tensors) else "R" if "h1" in call.tensors else "V"
        context = "V+R" if "identity" in call.tensors else "R" if "g" in call.tensors else "V"
        d, kt, kh, kw = call.shape("h2")
        return RelationalCase(
            kernel if kernel != "V" or "p1" in call.tensors else "V published", context, (kt, kh, kw), (t, h, w),
            clips if most is None else min(clips, most), queries, c, d, call.shape("v")[1],
            call.shape("g")[0] if "g" in call.tensors else 1, call.options.get("eps"), dtype=call.dtype(),
            layouts={n: "channels_last_3d" if layout == "channels_last" else layout for n, layout in layouts.items()},
            grad_layout="aligned",
        )  # fmt: skip
    if call.op == "bilinear_transform":
        clips, channels, frames, h, w = call.shape("x")
        return BilinearCase(
            (call.shape("p")[-1], call.shape("q")[-1]), (h, w),
            (call.shape("t")[1], call.shape("t")[-1]) if "t" in call.tensors else None, frames,
            clips if most is None else min(clips, most), channels, call.shape("p")[1], dtype=call.dtype(),
            matrices_dtype=getattr(torch, call.tensors["p"]["dtype"]),
            layouts={n: "channels_last_3d" if layout == "channels_last" else layout for n, layout in layouts.items()},
            grad_layout="aligned",
        )  # fmt: skip
    lead = call.shape("regions")[:-2]
    if most is not None and math.prod(lead) > most:
        lead = (most,)
    features = {"region_pool": "x", "region_remap": "nodes"}.get(call.op, "regions")
    size = call.shape("x")[-2:] if call.op == "region_pool" else tuple(call.options["size"])
    channels = call.shape("x")[-3] if call.op == "region_pool" else call.shape(features)[-1]
    return RegionCase(
        call.op, lead, call.shape("regions")[-2], channels, (size[0], size[1]), call.options.get("profile", "linear"),
        call.options.get("temperature", 1.0), dtype=call.dtype(),
        regions_dtype=getattr(torch, call.tensors["regions"]["dtype"]), layout=layouts[features],
        regions_layout="aligned", grad_layout="aligned",
    )  # fmt: skip


class Running:
    """A call on a device, forward and backward, at full size."""

    def __init__(self, call: TunedCall, device: torch.device):
        given = case_of(call).call()
        self.inputs = {name: self._tensor(name, spec, call, device) for name, spec in given.tensors.items()}
        self.op, self.options = OPS[call.op].function, given.options
        self.call = call

    @staticmethod
    def _tensor(name: str, spec: Any, call: TunedCall, device: torch.device) -> Tensor:
        if name == "regions":
            return spec.values().to(device)
        t = torch.randn(spec.shape, device=device, dtype=torch.float32).to(spec.dtype) * getattr(spec, "scale", 1.0)
        axis = OPS[call.op].channels.get(name)
        if axis is not None and call.tensors[name]["layout"] == "channels_last":
            t = t.movedim(axis, -1).contiguous().movedim(-1, axis)
        return t

    def __call__(self, between: Callable[[], None] = lambda: None) -> None:
        """Run it; `between` is called after the forward."""
        leaves = {name: t.detach().requires_grad_(self.call.wants(name)) for name, t in self.inputs.items()}
        out = self.op(**leaves, **self.options)
        between()
        wanted = [t for t in leaves.values() if t.requires_grad]
        if wanted:
            torch.autograd.grad(out, wanted, torch.ones_like(out))
