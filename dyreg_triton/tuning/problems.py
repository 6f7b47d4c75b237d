"""What a tuned call is in terms of kernels, of the testing kit, and of tensors on a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .calls import TunedCall
from .keys import Key, bilinear_key, region_key, relational_key
from .rooms import ROOMS


def keys_of(call: TunedCall, family: str) -> list[Key]:
    """The keys of the kernels that a call launches, in order."""
    feature = torch.empty(0, dtype=call.dtype(), device="cpu")
    if call.op == "relational_attention":
        return _relational_keys(call, feature)
    if call.op == "bilinear_transform":
        return _bilinear_keys(call, feature, family)
    lead = call.shape("regions")[:-2]
    frames, nodes = math.prod(lead), call.shape("regions")[-2]
    if call.op == "region_pool":
        channels, height, width = call.shape("x")[-3:]
    else:
        height, width = call.options["size"]
        channels = 1 if call.op == "region_kernel" else call.shape("nodes")[-1]

    def key(kind: str, channels: int = channels) -> Key:
        return region_key(kind, frames, nodes, channels, height * width, feature)

    if call.op == "region_kernel":
        return [key("dense")] + ([key("dense_moments", 16)] if call.backward else [])
    if call.op == "region_remap":
        backward = [key("gather_moments" if call.wants("regions") else "gather")] if call.backward else []
        return [key("scatter"), *backward]
    fused = key("scatter_moments")
    one_pass = nodes <= ROOMS["region"].default(fused, family).block_n
    if call.wants("x") and call.wants("regions"):
        backward = [fused] if one_pass else [key("scatter"), key("gather_moments")]
    else:
        backward = [key("scatter")] * call.wants("x") + [key("gather_moments")] * call.wants("regions")
    return [key("gather"), *backward]


def _relational_keys(call: TunedCall, feature: Tensor) -> list[Key]:
    clips, queries, c, *size = call.shape("q")
    d, *window = call.shape("h2")
    e = call.shape("v")[1]
    f = call.shape("g")[0] if "g" in call.tensors else e
    kinds = ["pack", "forward"]
    if call.backward:
        needed = {
            "backward": True, "fold_keys": call.wants("k"), "fold_values": call.wants("v"),
            "by_h1": call.wants("h1", "p1"), "by_h2": call.wants("h2", "g", "identity"),
        }  # fmt: skip
        kinds += [kind for kind, wanted in needed.items() if wanted]
    sizes = (size[0], size[1], size[2]), queries, (c, d, e, f), (window[0], window[1], window[2])
    return [relational_key(kind, clips, *sizes, feature) for kind in kinds]


def _bilinear_keys(call: TunedCall, feature: Tensor, family: str) -> list[Key]:
    shape, groups = call.shape("x"), call.shape("p")[1]
    cells = call.shape("p")[-1], call.shape("q")[-1]
    mixes, ts = (call.shape("t")[1], call.shape("t")[-1]) if "t" in call.tensors else (1, 1)

    def key(kind: str) -> Key:
        if kind.startswith("mix"):
            return bilinear_key(kind, shape, mixes, (1, 1), mixes, ts, feature)
        if kind.endswith("mixed"):
            return bilinear_key(kind, shape, groups, cells, mixes, ts, feature)
        return bilinear_key(kind, shape, groups, cells, 1, 1, feature)

    if "t" not in call.tensors:
        return [key("forward")] + [key("backward")] * bool(call.backward)

    def fused(kind: str) -> bool:
        return ROOMS["bilinear"].default(key(kind), family).fused

    kinds = ["forward_mixed"] if fused("forward_mixed") else ["forward", "mix"]
    if call.backward:
        passes = ["mix_backward"] + ["forward"] * call.wants("t") + ["backward"] * call.wants("x", "p", "q")
        kinds += ["backward_mixed"] if fused("backward_mixed") else passes
    return list(dict.fromkeys(key(kind) for kind in kinds))


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
        from .. import ops

        given = case_of(call).call()
        self.inputs = {name: self._tensor(name, spec, call, device) for name, spec in given.tensors.items()}
        self.op, self.options = getattr(ops, call.op), given.options
        self.call = call

    @staticmethod
    def _tensor(name: str, spec: Any, call: TunedCall, device: torch.device) -> Tensor:
        if name == "regions":
            return spec.values().to(device)
        t = torch.randn(spec.shape, device=device, dtype=torch.float32).to(spec.dtype) * getattr(spec, "scale", 1.0)
        if call.tensors[name]["layout"] == "channels_last":
            axis = -3 if call.op.startswith("region") else -4
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
