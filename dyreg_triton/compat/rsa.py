"""The published `ops.rsa`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._core.autocast import autocast_is_on
from .._core.validation import choice, flag, is_integer, positive_int, triple
from ..layers import rsa
from .families import Family, register

_KINDS = {"V": "V", "R": "R", "VplusR": "V+R"}


class RSA(rsa.RSA):
    """The published RSA: (B, d_in, T, H, W) -> (B, nh * dv, T, H, W), half of H and W where it strides.

    As there: a dv of 0 is d_out // nh, a dk of 0 is dv and a dd of 0 is dk, so the output has fewer channels than d_out
    where nh does not divide it; kernel "V" has no P1; any stride above 1 is the one average pool.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        nh: int = 1,
        dk: int = 16,
        dv: int = 0,
        dd: int = 0,
        kernel_size: Sequence[int] = (3, 7, 7),
        stride: Sequence[int] = (1, 1, 1),
        kernel_type: str = "V",
        feat_type: str = "V",
        *,
        keep_regions: bool = False,  # accepted for every module; this one has no regions
    ):
        op = "ops.rsa.RSA"
        for name, value in {"d_in": d_in, "d_out": d_out, "nh": nh}.items():
            positive_int(op, name, value)
        for name, value in {"dk": dk, "dv": dv, "dd": dd}.items():
            if not is_integer(value) or not 0 <= value < 2**31:
                raise ValueError(f"{op}: {name} is {value!r}; accepted is an integer >= 0 and below 2**31")
        choice(op, "kernel_type", kernel_type, tuple(_KINDS))
        choice(op, "feat_type", feat_type, tuple(_KINDS))
        flag(op, "keep_regions", keep_regions)
        size, steps = triple(op, "kernel_size", kernel_size), triple(op, "stride", stride)
        dv = dv or d_out // nh
        dk = dk or dv
        dd = dd or dk
        if not dv:
            raise ValueError(f"{op}: dv is 0 with d_out {d_out} and nh {nh}; accepted with it is d_out at least nh")
        if kernel_type == "V" and dd != dk:
            raise ValueError(f"{op}: dd is {dd} with kernel_type 'V'; accepted with it is dk, {dk}, or 0")
        if feat_type == "VplusR" and dk != dv:
            raise ValueError(f"{op}: dk is {dk} with feat_type 'VplusR'; accepted with it is dv, {dv}, or 0")
        super().__init__(
            d_in,
            nh * dv,
            num_queries=nh,
            key_channels=dk,
            value_channels=dv,
            latent_channels=dd,
            kernel_size=size,
            stride=(1, 2, 2) if max(steps) > 1 else 1,
            kernel=_KINDS[kernel_type],
            context=_KINDS[feat_type],
            basic_projection=kernel_type != "V",
        )

    def average(self, y: Tensor) -> Tensor:
        if max(self.stride) > 1 and y.device.type == "cpu" and autocast_is_on("cpu"):
            y = y.to(torch.promote_types(y.dtype, torch.float32))  # as torch's avg_pool3d there
        return super().average(y)


def _settings(module: Any) -> dict[str, Any]:
    names = ("nh", "dk", "dv", "dd", "kernel_size", "stride", "kernel_type", "feat_type")
    settings = {name: getattr(module, name) for name in names}
    # its projection and queries say these again
    return settings | {"d_in": module.projection.in_channels, "d_out": module.nh * module.dv}


register(Family("RSA", RSA, ("projection", "H2"), _settings, lambda ours: (2, ours.in_channels, 3, 5, 4)))
