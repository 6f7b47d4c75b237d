"""The published `ops.dyreg` and `ops.rstg`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .._core.validation import choice, flag, is_integer, layer_input, positive_int
from ..layers import dyreg, rstg
from ..layers.generators import Fishnet, GloRe
from ..layers.leaves import tensor_of
from ..layers.norms import ChannelAffineNorm
from ..pretrained import Pretrained
from .families import Family, register

# dyregParams of the published code
_PARAMS: dict[str, Any] = {
    "full_res": False,
    "rstg_combine": "plus",
    "dynamic_regions": "dyreg",
    "offset_lstm_dim": 128,
    "offset_generator": "big",
    "init_regions": "center",
    "combine_by_sum": True,
    "aggregation_type": "dot",
    "send_layers": 1,
    "update_layers": 0,
}


def _params(op: str, given: object) -> dict[str, Any]:
    """dyregParams as a dict, from a mapping or an object; missing keys take the published defaults."""
    if given is None:
        given = {}
    if isinstance(given, Mapping):
        unknown = sorted(map(str, set(given) - set(_PARAMS)))
        if unknown:
            raise ValueError(f"{op}: params has unknown keys {unknown}; accepted are {sorted(_PARAMS)}")
        params = {**_PARAMS, **given}
    else:
        if not any(hasattr(given, key) for key in _PARAMS):
            raise TypeError(
                f"{op}: params is {given!r}; accepted is a mapping or an object with some of {sorted(_PARAMS)}"
            )
        params = {key: getattr(given, key, default) for key, default in _PARAMS.items()}
    for key in ("full_res", "combine_by_sum"):
        flag(op, f"params.{key}", params[key])
    choice(op, "params.offset_generator", params["offset_generator"], ("big", "small"))
    choice(op, "params.init_regions", params["init_regions"], ("center", "grid"))
    # upstream's "pos_only" computes what "dyreg" does; "none", "semantic" and "serial" stop with an error there
    choice(op, "params.dynamic_regions", params["dynamic_regions"], ("dyreg", "pos_only"))
    choice(op, "params.rstg_combine", params["rstg_combine"], ("plus",))
    return params


def _graph_options(op: str, params: Mapping[str, Any], rnn_type: object, iterations: object) -> dict[str, Any]:
    choice(op, "rnn_type", rnn_type, ("LSTM", "GRU"))
    kind = params["aggregation_type"]
    if not isinstance(kind, str) or ("sum" not in kind and "dot" not in kind):
        raise ValueError(f"{op}: params.aggregation_type is {kind!r}; accepted are 'dot' and 'sum'")
    return {
        "recurrence": str(rnn_type).lower(),
        "combine": "sum" if params["combine_by_sum"] else "concatenate",
        "send_layers": params["send_layers"],
        "update_layers": params["update_layers"],
        "aggregation": "mean" if "sum" in kind else "dot",
        "order": "time-space",
        "iterations": iterations,
    }


# what the published DynamicGraph leaves on itself after a forward, and which of it `keep_regions` offers
_EXTENTS = ("kernel_h", "kernel_w", "kernel_center_h", "kernel_center_w")
_KEPT = ("kernel", "offsets", *_EXTENTS, "nodes", "nodes_wo_position", "aux_feats")
_MEANS = ("global_mean_features", "nodes_background", "nodes_foreground", "kernel_foreground", "kernel_background")
_LEFT = ("B", "T", "BT", "arange_h", "arange_w", *_MEANS)


class _Published(Pretrained):
    """Saves `params`, which may be an object, as the mapping that was read from it."""

    def _understood(self, arguments: dict[str, Any]) -> dict[str, Any]:
        params = arguments.get("params")
        return arguments if params is None else {**arguments, "params": _params(type(self).__name__, params)}


class RSTG(_Published, rstg.RSTG):
    """The published RSTG: nodes (B, T, C, N) -> (B, T, C, N)."""

    def __init__(
        self,
        params: object = None,
        backbone_dim: int = 1024,
        node_dim: int = 512,
        project_i3d: bool = True,
        *,
        rnn_type: str = "LSTM",
        num_nodes: int = 9,
        iterations: int = 3,
        keep_regions: bool = False,  # accepted for every module; this one has no regions
    ):
        op = "ops.rstg.RSTG"
        options = _graph_options(op, _params(op, params), rnn_type, iterations)
        flag(op, "keep_regions", keep_regions)
        super().__init__(positive_int(op, "node_dim", node_dim), **options)
        self.num_nodes = positive_int(op, "num_nodes", num_nodes)

    def forward(self, input: Tensor) -> Tensor:  # the published name
        shape = (None, None, self.channels, self.num_nodes)
        form = f"(B, T, {shape[2]}, {shape[3]}) for node_dim {shape[2]} and num_nodes {shape[3]}"
        layer_input("ops.rstg.RSTG", "input", input, tensor_of(self.internal_lstm, self), shape, form)
        return super().forward(input.mT).mT.contiguous()


class DynamicGraph(_Published, dyreg.DynamicGraph):
    """The published DynamicGraph: (B, T, C, H, W) -> (B, T, C, H, W), no residual.

    With `keep_regions=True` a forward leaves, detached, what plotting code and the authors' networks read: `kernel`
    (B*T, h, w, H, W); `offsets` (B*T, N, 1, 4) = (size_h, size_w, centre_h, centre_w) and each of the four as
    `kernel_h`, `kernel_w`, `kernel_center_h`, `kernel_center_w` (B*T, N, 1); `nodes` as they enter the graph and
    `nodes_wo_position`, without their embedding, both (B, T, C, N); and the dict `aux_feats`.
    """

    ph_buf: Tensor
    pw_buf: Tensor

    def __init__(
        self,
        params: object = None,
        backbone_dim: int = 1024,
        H: int = 14,
        W: int = 14,
        oH: int = 7,
        oW: int = 7,
        iH: int | None = None,
        iW: int | None = None,
        h: int = 3,
        w: int = 3,
        node_dim: int = 512,
        out_num_ch: int = 2048,
        project_i3d: bool = False,
        name: str = "",
        *,
        rnn_type: str = "LSTM",
        iterations: int = 3,
        num_nodes: int | None = None,
        keep_regions: bool = False,
    ):
        op = "ops.dyreg.DynamicGraph"
        chosen = _params(op, params)
        sizes = {"backbone_dim": backbone_dim, "H": H, "W": W, "h": h, "w": w, "node_dim": node_dim}
        for key, value in sizes.items():
            positive_int(op, key, value)
        graph = _graph_options(op, chosen, rnn_type, iterations)
        flag(op, "project_i3d", project_i3d)
        flag(op, "keep_regions", keep_regions)
        if not project_i3d and node_dim != backbone_dim:
            raise ValueError(
                f"{op}: node_dim is {node_dim} and backbone_dim {backbone_dim} with project_i3d False; "
                "accepted without projection are equal ones"
            )
        train_size = None
        if chosen["full_res"]:
            if iH is None or iW is None:
                raise ValueError(f"{op}: iH is {iH!r} and iW {iW!r}; accepted with full_res are positive integers")
            train_size = positive_int(op, "iH", iH), positive_int(op, "iW", iW)
        if num_nodes is not None and not (is_integer(num_nodes) and num_nodes == h * w):
            raise ValueError(f"{op}: num_nodes is {num_nodes!r}; accepted is h * w = {h * w}")
        super().__init__(
            backbone_dim,
            (H, W),
            grid=(h, w),
            node_channels=node_dim,
            project=project_i3d,
            region_channels=positive_int(op, "params.offset_lstm_dim", chosen["offset_lstm_dim"]),
            generator="fc" if chosen["offset_generator"] == "big" else "pooled",
            weights_over="nodes",
            init=chosen["init_regions"],
            region_rule="published",
            offset_bias=True,
            train_size=train_size,
            **graph,
        )
        self.keep_regions = keep_regions
        centers = super().initial_centers(None)
        if self.init == "center":  # upstream halves H on both axes
            centers = torch.full_like(centers, H / 2)
        self.register_buffer("ph_buf", centers[None, :, 1:].clone())
        self.register_buffer("pw_buf", centers[None, :, :1].clone())
        self.register_buffer("arange_h_buf", torch.arange(H, dtype=torch.int64, device=None)[None, None])
        self.register_buffer("arange_w_buf", torch.arange(W, dtype=torch.int64, device=None)[None, None])
        if self.generator == "pooled":
            # in the authors' checkpoints, and never used
            self.glore.norm_dict = nn.ModuleDict({"offset_location_emb": ChannelAffineNorm((1, node_dim, 1, 1), 3)})

    def initial_centers(self, device: torch.device | None) -> Tensor:
        return torch.cat([self.pw_buf, self.ph_buf], dim=-1)[0]

    def pool(self, features: Tensor, regions: Tensor) -> Tensor:
        nodes = super().pool(features, regions)
        if self.keep_regions:
            with torch.no_grad():
                self._keep(features, regions, nodes)
        return nodes

    def _keep(self, features: Tensor, regions: Tensor, nodes: Tensor) -> None:
        options: dict[str, Any] = {"profile": self.profile, "temperature": self.temperature}
        features, regions, nodes = features.detach(), regions.detach(), nodes.detach()
        flat = regions.flatten(0, 1)
        cx, cy, w, h = flat.unsqueeze(-2).unbind(-1)
        kernel = ops.region_kernel(flat, self.size, **options)
        self.kernel = kernel.unflatten(1, self.grid)
        self.offsets = torch.stack([h, w, cy, cx], dim=-1)
        self.kernel_h, self.kernel_w, self.kernel_center_h, self.kernel_center_w = h, w, cy, cx
        self.nodes = nodes.mT
        self.nodes_wo_position = ops.region_pool(features, regions, **options).mT

        maps = features.flatten(0, 1)
        foreground = kernel.mean(1).flatten(1)
        background = foreground.amax(1, keepdim=True) - foreground
        background = (background / background.sum(1, keepdim=True)).to(maps.dtype)
        self.aux_feats = {
            "global_mean_features": maps.mean((-2, -1)),
            "nodes_background": (maps.flatten(2) @ background.unsqueeze(-1)).unsqueeze(-1),
            "nodes_foreground": nodes.mean(-2),
            "kernel_foreground": foreground / foreground.sum(1, keepdim=True),
        }

    def __getattr__(self, name: str) -> Any:
        if name in (*_KEPT, *_LEFT):
            how = "left only with keep_regions=True, by a forward" if name in _KEPT else "not left"
            raise AttributeError(
                f"ops.dyreg.DynamicGraph: {name!r}, which the published module leaves on itself, is {how}"
            )
        return super().__getattr__(name)

    def forward(self, input_feats: Tensor) -> Tensor:  # type: ignore[override]  # published: no regions returned
        return super().forward(input_feats)[0]


class DynamicGraphWrapper(_Published):
    """The published DynamicGraphWrapper: (B, T, C, H, W) -> (B * T, C, H, W), residual included."""

    def __init__(
        self,
        params: object = None,
        H: int = 14,
        W: int = 14,
        oH: int = 7,
        oW: int = 7,
        iH: int | None = None,
        iW: int | None = None,
        h: int = 3,
        w: int = 3,
        node_dim: int = 512,
        in_channels: int = 1024,
        out_num_ch: int = 2048,
        project_i3d: bool = False,
        name: str = "",
        **ours: Any,
    ):
        super().__init__()
        op = "ops.dyreg.DynamicGraphWrapper"
        positive_int(op, "in_channels", in_channels)
        _graph_options(op, _params(op, params), ours.get("rnn_type", "LSTM"), ours.get("iterations", 3))
        if not flag(op, "project_i3d", project_i3d) and positive_int(op, "node_dim", node_dim) != in_channels:
            raise ValueError(
                f"{op}: node_dim is {node_dim} and in_channels {in_channels} with project_i3d False; "
                "accepted without projection are equal ones"
            )
        self.dynamic_graph = DynamicGraph(
            params, in_channels, H, W, oH, oW, iH, iW, h, w, node_dim, out_num_ch, project_i3d, name, **ours
        )
        self.norm_dict = nn.ModuleDict({"residual_norm": ChannelAffineNorm((1, in_channels, 1, 1), 3, start=0.0)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.dynamic_graph(x).flatten(0, 1)
        return x.flatten(0, 1) + self.norm_dict["residual_norm"](y)


def _rstg_settings(module: Any) -> dict[str, Any]:
    return {
        "params": module.params,
        "node_dim": module.node_dim,
        "rnn_type": type(module.internal_lstm).__name__,
        "num_nodes": module.num_nodes,
        "iterations": module.number_iterations,
    }


def _graph_settings(module: Any) -> dict[str, Any]:
    names = ("params", "backbone_dim", "H", "W", "h", "w", "project_i3d")
    return {
        **{name: getattr(module, name) for name in names},
        **{name: getattr(module, name, None) for name in ("iH", "iW")},  # of full_res alone
        "node_dim": module.rstg.node_dim,
        "rnn_type": type(module.offset_lstm).__name__,
        "iterations": module.rstg.number_iterations,
        "num_nodes": module.num_nodes,
    }


def _wrapper_settings(module: Any) -> dict[str, Any]:
    settings = _graph_settings(module.dynamic_graph)
    channels = settings.pop("backbone_dim")
    return {**settings, "in_channels": channels}


register(
    Family(
        "DynamicGraphWrapper",
        DynamicGraphWrapper,
        ("dynamic_graph", "norm_dict"),
        _wrapper_settings,
        lambda ours: (2, 3, ours.dynamic_graph.in_channels, *ours.dynamic_graph.size),
    )
)
register(
    Family(
        "DynamicGraph",
        DynamicGraph,
        ("rstg", "offset_lstm", "offset_pred", "offset_alpha", "kernel_projection1"),
        _graph_settings,
        lambda ours: (2, 3, ours.in_channels, *ours.size),
        (*_KEPT, *_LEFT),
        _KEPT,
    )
)
register(
    Family(
        "RSTG",
        RSTG,
        ("internal_lstm", "external_lstm", "send_mlp", "norm_dict"),
        _rstg_settings,
        lambda ours: (2, 12, ours.channels, ours.num_nodes),
        ("B", "T"),
    )
)
register(Family("Fishnet", Fishnet, ("tail_conv", "body_trans_conv", "head_conv")))
register(Family("GloRe", GloRe, ("mask_conv", "sin_pos_emb_proj")))
