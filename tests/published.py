"""Small models in the style of the published ones: their class, attribute and parameter names, and their numbers.

Written from what the authors' modules do, in plain torch; `test_swap.py` compares these with the authors' numbers and
then swaps them. As there, some modules read a global, here `ARGS`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ARGS = SimpleNamespace(rnn_type="LSTM", offset_lstm_dim=128)


# --- relational self-attention --------------------------------------------------------------------------------------


class RSA(nn.Module):
    def __init__(
        self,
        d_in: int,
        d_out: int,
        nh: int = 1,
        dk: int = 16,
        dv: int = 0,
        dd: int = 0,
        kernel_size: tuple[int, int, int] = (3, 7, 7),
        stride: tuple[int, int, int] = (1, 1, 1),
        kernel_type: str = "V",
        feat_type: str = "V",
    ):
        super().__init__()
        self.d_in, self.d_out, self.nh = d_in, d_out, nh
        self.dv = dv = dv or d_out // nh
        self.dk = dk = dk or dv
        self.dd = dd = dd or dk
        self.kernel_size, self.stride = kernel_size, stride
        self.kernel_type, self.feat_type = kernel_type, feat_type
        self.ksize = math.prod(kernel_size)
        self.pad = tuple(k // 2 for k in kernel_size)
        keys = 0 if kernel_type == "V" else dk
        self.projection = nn.Conv3d(d_in, nh * dk + keys + dv, 1, bias=False)
        if kernel_type == "VplusR":
            self.P1 = nn.Parameter(torch.randn(1, dk, dd) / math.sqrt(self.ksize * dd))
        if kernel_type != "V":
            self.H1 = nn.Conv3d(dk, dk * dd, kernel_size, padding=self.pad, groups=dk, bias=False)
        self.H2 = nn.Conv3d(1, dd, kernel_size, padding=self.pad, bias=False)
        if feat_type != "V":
            self.G = nn.Conv3d(1, dv, kernel_size, padding=self.pad, bias=False)
        if feat_type == "VplusR":
            self.I = nn.Parameter(torch.eye(dk)[None])
        if max(stride) > 1:
            self.avgpool = nn.AvgPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))

    def L2norm(self, x: Tensor, d: int = 1) -> Tensor:
        return x / (x.square().sum(d, keepdim=True) + 1e-6).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        projected = self.projection(x)
        queries, rest = projected.split([self.nh * self.dk, projected.shape[1] - self.nh * self.dk], dim=1)
        kernel = self.L2norm(queries.unflatten(1, (self.nh, self.dk)), 2)
        if self.kernel_type != "V":
            correlated = self.H1(self.L2norm(rest[:, : self.dk])).unflatten(1, (self.dk, self.dd))
            if self.kernel_type == "VplusR":
                correlated = correlated + self.P1[..., None, None, None]
            kernel = torch.einsum("blcthw,bcdthw->bldthw", kernel, correlated)
        values = self.L2norm(rest[:, -self.dv :]).flatten(0, 1)[:, None]
        feature = self.H2(values).unflatten(0, (batch, self.dv))
        if self.feat_type != "V":
            context = self.G(values).unflatten(0, (batch, self.dv))
            if self.feat_type == "VplusR":
                context = context + self.I[..., None, None, None]
            feature = torch.einsum("befthw,bedthw->bfdthw", context, feature)
        y = torch.einsum("bldthw,bedthw->belthw", kernel, feature).flatten(1, 2)
        return self.avgpool(y) if max(self.stride) > 1 else y


# --- dynamic regions ------------------------------------------------------------------------------------------------


class dyregParams(nn.Module):
    """Settings. A module there, although it holds no tensors: so it is a submodule of whoever keeps it."""

    def __init__(self, **settings: Any):
        super().__init__()
        self.full_res = False
        self.rstg_combine = "plus"
        self.dynamic_regions = "dyreg"
        self.offset_lstm_dim = 128
        self.offset_generator = "big"
        self.init_regions = "center"
        self.combine_by_sum = True
        self.aggregation_type = "dot"
        self.send_layers = 1
        self.update_layers = 0
        for name, value in settings.items():
            setattr(self, name, value)


def _recurrent(channels: int) -> nn.RNNBase:
    return getattr(nn, ARGS.rnn_type)(channels, channels, batch_first=True)


def _over_time(rnn: nn.RNNBase, sequences: Tensor) -> Tensor:
    """The outputs. An LSTM's input is lowered as autocast does inside, which fails on CPUs without AVX-512."""
    kind = sequences.device.type
    if isinstance(rnn, nn.LSTM) and torch.is_autocast_enabled(kind) and sequences.dtype != torch.float64:
        sequences = sequences.to(torch.get_autocast_dtype(kind))
    return rnn(sequences)[0]


class _Affine(nn.Module):
    def __init__(self, shape: list[int], norm_shape: tuple[int, ...], start: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.full(shape, start))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.norm = nn.LayerNorm(norm_shape, elementwise_affine=False)

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(input) * self.scale + self.bias


class LayerNormAffine2D(_Affine):
    def __init__(self, num_ch: int, norm_shape: tuple[int, ...], zero_init: bool = False):
        super().__init__([1, num_ch, 1, 1], norm_shape, 0.0 if zero_init else 1.0)


class LayerNormAffineXC(_Affine):
    def __init__(self, num_ch: int, norm_shape: tuple[int, ...]):
        super().__init__([num_ch], norm_shape)


class RSTG(nn.Module):
    """Nodes (B, T, C, 9) -> (B, T, C, 9)."""

    def __init__(self, params: Any, backbone_dim: int = 1024, node_dim: int = 512, project_i3d: bool = True):
        super().__init__()
        self.params = params
        self.backbone_dim, self.node_dim, self.project_i3d = backbone_dim, node_dim, project_i3d
        self.number_iterations = 3
        self.num_nodes = n = 9
        self.norm_dict = nn.ModuleDict()
        self.internal_lstm = _recurrent(node_dim)
        self.external_lstm = _recurrent(node_dim)
        inputs = node_dim if params.combine_by_sum else 2 * node_dim
        two = [nn.Linear(inputs, node_dim), nn.ReLU(), nn.Linear(node_dim, node_dim), nn.ReLU()]
        self.send_mlp = nn.Sequential(*two if params.send_layers == 2 else [nn.Linear(node_dim, node_dim), nn.ReLU()])
        self.norm_dict["send_message_norm"] = LayerNormAffineXC(node_dim, (n, n, node_dim))
        self.norm_dict["update_norm"] = LayerNormAffineXC(node_dim, (n, node_dim))
        self.norm_dict["before_graph_norm"] = LayerNormAffineXC(node_dim, (n, node_dim))
        if "dot" in params.aggregation_type:
            self.att_q = nn.Linear(node_dim, node_dim)
            self.att_k = nn.Linear(node_dim, node_dim)
            self.att_bias = nn.Parameter(torch.zeros(1, 1, 1, node_dim))
        self.update_mlp: nn.Module = nn.Identity()
        if params.update_layers == 1:
            self.update_mlp = nn.Sequential(nn.Linear(node_dim, node_dim), nn.ReLU())
        elif params.update_layers == 2:
            two = [nn.Linear(inputs, node_dim), nn.ReLU(), nn.Linear(node_dim, node_dim), nn.ReLU()]
            self.update_mlp = nn.Sequential(*two)

    def over_time(self, rnn: nn.RNNBase, nodes: Tensor) -> Tensor:
        rnn.flatten_parameters()
        sequences = _over_time(rnn, nodes.transpose(1, 2).flatten(0, 1))
        return sequences.unflatten(0, (self.B, self.num_nodes)).transpose(1, 2)

    def combine(self, one: Tensor, other: Tensor) -> Tensor:
        return one + other if self.params.combine_by_sum else torch.cat([one, other], dim=-1)

    def aggregate(self, nodes: Tensor, messages: Tensor) -> Tensor:
        if "sum" in self.params.aggregation_type:
            return messages.mean(3)
        weights = torch.softmax(self.att_q(nodes) @ self.att_k(nodes).transpose(-1, -2), dim=-1)
        return F.relu((weights[..., None] * messages).sum(3) + self.att_bias)

    def forward(self, input: Tensor) -> Tensor:
        self.B, self.T = input.shape[:2]
        nodes = self.norm_dict["before_graph_norm"](input.transpose(2, 3))  # here (B, T, N, C)
        for iteration in range(self.number_iterations):
            if iteration < 3:
                nodes = self.over_time(self.internal_lstm, nodes)
            shape = (-1, -1, self.num_nodes, self.num_nodes, -1)  # receivers, senders
            pairs = self.combine(nodes[:, :, None].expand(shape), nodes[:, :, :, None].expand(shape))
            messages = self.norm_dict["send_message_norm"](self.send_mlp(pairs))
            received = self.aggregate(nodes, messages)
            nodes = self.norm_dict["update_norm"](self.update_mlp(self.combine(nodes, received)))
        return self.over_time(self.external_lstm, nodes).transpose(2, 3).contiguous()


class Fishnet(nn.Module):
    def __init__(self, input_height: int = 14, input_channels: int = 16, keep_spatial_size: bool = False):
        super().__init__()
        self.offset_layers = 2
        self.offset_channels, self.offset_channels_tr = [32, 16, 16], [32, 32, 16]
        self.input_height, self.keep_spatial_size = input_height, keep_spatial_size
        (s0, p0), (s1, p1) = ((2, 0), (2, 0)) if input_height > 20 else ((2 if input_height > 10 else 1, 0), (1, 1))
        first = (input_height - 3) // s0 + 1
        last = (first + 2 * p1 - 3) // s1 + 1
        self.norm_size = [first, last, last]
        self.norm_dict = nn.ModuleDict()
        self.conv1 = nn.Conv2d(input_channels, 32, 1)
        self.tail_conv = nn.ModuleList([nn.Conv2d(32, 32, 3, s0, p0), nn.Conv2d(32, 16, 3, s1, p1)])
        self.body_trans_conv = nn.ModuleList([nn.ConvTranspose2d(16, 32, 3, s1, p1)])
        self.head_conv = nn.ModuleList([nn.Conv2d(32, 16, 3, s1, p1)])
        sides = {
            "norm1": (32, input_height),
            "tail_norm_0": (32, first),
            "tail_norm_1": (16, last),
            "body_trans_norm_0": (32, first),
            "head_norm_0": (16, last),
        }
        for name, (channels, side) in sides.items():
            self.norm_dict[name] = LayerNormAffine2D(channels, (channels, side, side))

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm_dict
        x = norm["norm1"](F.relu(self.conv1(x)))
        kept = norm["tail_norm_0"](F.relu(self.tail_conv[0](x)))
        x = norm["tail_norm_1"](F.relu(self.tail_conv[1](kept)))
        x = norm["body_trans_norm_0"](F.relu(self.body_trans_conv[0](x))) + kept
        return norm["head_norm_0"](F.relu(self.head_conv[0](x)))


def _waves(side: int, channels: int) -> Tensor:
    """(side, channels): sines of the even frequencies, then cosines of the odd ones."""
    periods = 10000 ** (torch.arange(channels).float() / channels)
    place = torch.linspace(0, 1, side)[:, None]
    return torch.cat([torch.sin(place / periods[0::2]), torch.cos(place / periods[1::2])], dim=1)


class GloRe(nn.Module):
    def __init__(self, input_height: int = 14, input_channels: int = 16, h: int = 3, w: int = 3):
        super().__init__()
        self.h, self.w, self.H, self.W = h, w, input_height, input_height
        self.input_channels, self.num_nodes = input_channels, h * w
        self.norm_dict = nn.ModuleDict(
            {"offset_location_emb": LayerNormAffine2D(input_channels, (input_channels, h, w))}
        )
        self.mask_conv = nn.Conv2d(input_channels, self.num_nodes, 1)
        self.update = nn.Conv1d(input_channels, ARGS.offset_lstm_dim, 1)
        half = _waves(input_height, input_channels // 2).T
        rows = half[:, :, None].expand(-1, -1, input_height)
        self.register_buffer("pos_emb_buf", torch.cat([rows, rows.mT]))
        self.sin_pos_emb_proj = nn.Conv2d(input_channels, input_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        shares = torch.softmax(self.mask_conv(x), dim=1)
        placed = x + self.sin_pos_emb_proj(self.pos_emb_buf[None])
        return self.update(placed.flatten(2) @ shares.flatten(2).mT)


def _atanh(x: Tensor) -> Tensor:
    x = x.clamp(-1 + 1e-7, 1 - 1e-7)
    return 0.5 * (torch.log(1 + x) - torch.log(1 - x))


class DynamicGraph(nn.Module):
    """x (B, T, C, H, W) -> the same; leaves its regions, kernels and nodes on itself."""

    def __init__(
        self,
        params: Any,
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
    ):
        super().__init__()
        self.params = params
        self.iH, self.iW, self.name = iH, iW, name
        self.rstg = RSTG(params, backbone_dim=backbone_dim, node_dim=node_dim, project_i3d=project_i3d)
        self.backbone_dim, self.C, self.out_num_ch = backbone_dim, node_dim, out_num_ch
        self.H, self.W, self.h, self.w = H, W, h, w
        self.num_nodes = h * w
        self.project_i3d = project_i3d
        ph, pw = self.compute_anchors()
        self.register_buffer("ph_buf", ph)
        self.register_buffer("pw_buf", pw)
        self.norm_dict = nn.ModuleDict()
        if project_i3d:
            self.project_i3d_linear = nn.Conv2d(backbone_dim, node_dim, 1)
            self.project_back_i3d_linear = nn.Conv2d(node_dim, backbone_dim, 1)
        latent = params.offset_lstm_dim
        side = H
        if params.full_res:
            self.input_pooling = nn.AdaptiveAvgPool2d((iH, iW))
            side = iH
        if params.offset_generator == "big":
            self.fishnet = Fishnet(input_channels=node_dim, input_height=side)
            whole = self.fishnet.norm_size[-1]
            self.global_conv = nn.Sequential(
                nn.Conv2d(16, self.num_nodes * latent, whole), nn.AdaptiveAvgPool2d((1, 1))
            )
        else:
            self.glore = GloRe(input_channels=node_dim, input_height=H, h=h, w=w)
        self.offset_lstm = _recurrent(latent)
        self.offset_pred = nn.Linear(latent, 4)
        self.offset_alpha = nn.Parameter(torch.zeros(4))
        if params.full_res:
            self.kernel_projection1 = nn.Linear(iH * iW, node_dim)
            self.kernel_location_pool = nn.AdaptiveAvgPool2d((iH, iW))
        else:
            self.kernel_projection1 = nn.Linear(H * W, node_dim)
        self.register_buffer("arange_h_buf", torch.arange(H)[None, None])
        self.register_buffer("arange_w_buf", torch.arange(W)[None, None])
        for key in ("offset_ln_feats_coords", "offset_ln_lstm"):
            self.norm_dict[key] = LayerNormAffineXC(latent, (self.num_nodes, latent))
        if project_i3d:
            self.norm_dict["dynamic_graph_projection"] = LayerNormAffine2D(node_dim, (node_dim, H, W))
        self.aux_feats: dict[str, Tensor] = {}

    def compute_anchors(self) -> tuple[Tensor, Tensor]:
        if self.params.init_regions == "center":
            return torch.full((1, self.num_nodes, 1), self.H / 2), torch.full((1, self.num_nodes, 1), self.H / 2)
        rows = torch.linspace(0, self.H, 2 * self.h + 1)[1::2]
        columns = torch.linspace(0, self.W, 2 * self.w + 1)[1::2]
        ph, pw = torch.meshgrid(rows, columns, indexing="ij")
        return ph.reshape(1, -1, 1), pw.reshape(1, -1, 1)

    def get_offsets(self, x: Tensor) -> Tensor:
        if self.params.full_res:
            x = self.input_pooling(x)
        if self.params.offset_generator == "big":
            latent = self.global_conv(self.fishnet(x)).view(self.BT, self.num_nodes, -1)
        else:
            latent = self.glore(x).permute(0, 2, 1)
        latent = self.norm_dict["offset_ln_feats_coords"](latent).unflatten(0, (self.B, self.T))
        self.offset_lstm.flatten_parameters()
        latent = _over_time(self.offset_lstm, latent.transpose(1, 2).flatten(0, 1))
        latent = latent.unflatten(0, (self.B, self.num_nodes)).transpose(1, 2).flatten(0, 1)
        return self.offset_pred(self.norm_dict["offset_ln_lstm"](latent)) * self.offset_alpha

    def get_dynamic_kernel(self, offsets: Tensor) -> Tensor:
        self.arange_h, self.arange_w = self.arange_h_buf, self.arange_w_buf

        def axis(size: Tensor, shift: Tensor, anchor: Tensor, cells: Tensor, side: int, parts: int) -> list[Tensor]:
            extent = size.exp() * (side / (2 * parts) + 1) + 1
            centre = torch.tanh(shift + _atanh(2 * anchor / side - 1)) * (side / 2) + side / 2
            centre = centre.clamp(0, side - 1)
            return [extent, centre, F.relu(extent - (cells - centre).abs())]

        oh, ow, dh, dw = offsets.split(1, dim=-1)
        self.kernel_h, self.kernel_center_h, rows = axis(oh, dh, self.ph_buf, self.arange_h, self.H, self.h)
        self.kernel_w, self.kernel_center_w, columns = axis(ow, dw, self.pw_buf, self.arange_w, self.W, self.w)
        parts = [self.kernel_h, self.kernel_w, self.kernel_center_h, self.kernel_center_w]
        self.offsets = torch.stack(parts, dim=3)
        kernel = rows[..., None] * columns[..., None, :]
        kernel = kernel / (kernel.sum((2, 3), keepdim=True) + 1e-37)
        return kernel.view(self.BT, self.h, self.w, self.H, self.W)

    def set_input(self, x: Tensor) -> Tensor:
        self.kernel = self.get_dynamic_kernel(self.get_offsets(x))
        each = self.kernel.flatten(1, 2)  # (BT, N, H, W)
        nodes = x.flatten(2) @ each.flatten(2).mT
        place = self.kernel_location_pool(each) if self.params.full_res else each
        position = self.kernel_projection1(place.flatten(2)).mT
        self.nodes_wo_position = nodes.unflatten(0, (self.B, self.T))
        self.nodes = (nodes + position).unflatten(0, (self.B, self.T))
        front = each.mean(1, keepdim=True)
        back = front.amax((2, 3), keepdim=True) - front
        self.kernel_background = (back / back.sum((2, 3), keepdim=True))[:, None]
        self.kernel_foreground = (front / front.sum((2, 3), keepdim=True)).flatten(1)
        self.global_mean_features = x.mean((2, 3))
        self.nodes_background = (x.flatten(2) @ self.kernel_background.flatten(1)[..., None])[..., None]
        self.nodes_foreground = self.nodes.mean(-1)
        for name in ("global_mean_features", "nodes_background", "nodes_foreground", "kernel_foreground"):
            self.aux_feats[name] = getattr(self, name)
        return self.nodes

    def forward(self, input_feats: Tensor) -> Tensor:
        self.B, self.T = input_feats.shape[:2]
        self.BT = self.B * self.T
        x = input_feats.view(self.BT, *input_feats.shape[2:])
        if self.project_i3d:
            x = self.norm_dict["dynamic_graph_projection"](self.project_i3d_linear(x))
        nodes = self.rstg(self.set_input(x)).view(self.BT, self.C, self.num_nodes)  # views, as there: of dense results
        y = (nodes @ self.kernel.flatten(1, 2).flatten(2)).unflatten(2, (self.H, self.W))
        if self.project_i3d:
            y = self.project_back_i3d_linear(y)
        return y.view(self.B, self.T, *y.shape[1:])


class DynamicGraphWrapper(nn.Module):
    """x (B, T, C, H, W) -> (B * T, C, H, W), residual included."""

    def __init__(
        self,
        params: Any,
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
    ):
        super().__init__()
        self.dynamic_graph = DynamicGraph(
            params, in_channels, H, W, oH, oW, iH, iW, h, w, node_dim, out_num_ch, project_i3d, name
        )
        self.params, self.in_channels = params, in_channels
        self.H, self.W, self.iH, self.iW = H, W, iH, iW
        self.norm_dict = nn.ModuleDict()
        if params.rstg_combine != "serial":
            self.norm_dict["residual_norm"] = LayerNormAffine2D(in_channels, (in_channels, H, W), zero_init=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dynamic_graph(x)
        y = self.norm_dict["residual_norm"](y.view(-1, *y.shape[2:]))
        return y if self.params.rstg_combine == "serial" else x.view(y.shape) + y


class SplitBT(nn.Module):
    """A block on images, whose result is given as clips of T frames."""

    def __init__(self, block: nn.Module, T: int):
        super().__init__()
        self.block, self.T = block, T

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).unflatten(0, (-1, self.T))


# --- bilinear attentional transforms and non-local blocks ------------------------------------------------------------


class NonLocalModule(nn.Module):
    """What the blocks share: how the authors' networks start them."""

    def __init__(self, in_channels: int, **ignored: Any):
        super().__init__()

    def init_modules(self, zero_bn: bool = True) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)):
                nn.init.constant_(module.weight, 0.0 if zero_bn else 1.0)
                nn.init.zeros_(module.bias)


class _NonLocalBlockND(NonLocalModule):
    """(B, C, *) -> the same, residual included."""

    def __init__(
        self,
        in_channels: int,
        inter_channels: int | None = None,
        dimension: int = 3,
        head: int = 1,
        sub_sample: bool = True,
        bn_layer: bool = True,
        use_scale: bool = True,
        zero_init: bool = False,
        **ignored: Any,
    ):
        super().__init__(in_channels)
        self.dimension, self.head = dimension, head
        self.sub_sample, self.use_scale, self.zero_init = sub_sample, use_scale, zero_init
        self.in_channels = in_channels
        self.inter_channels = inner = max(in_channels // 2, 1) if inter_channels is None else inter_channels
        assert inner % head == 0
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimension - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimension - 1]
        pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dimension - 1]
        cells = (1, 2, 2) if dimension == 3 else 2

        def fewer(projection: nn.Module) -> nn.Module:
            return nn.Sequential(pool(cells), projection) if sub_sample else projection

        self.g = fewer(conv(in_channels, inner, 1))
        out = conv(inner, in_channels, 1)
        self.W = nn.Sequential(out, norm(in_channels)) if bn_layer else out
        self.theta = conv(in_channels, inner, 1)
        self.phi = fewer(conv(in_channels, inner, 1))

    def init_modules(self) -> None:  # type: ignore[override]
        super().init_modules()
        out = self.W[0] if isinstance(self.W, nn.Sequential) else self.W
        nn.init.normal_(out.weight, 0.0, 0.0 if self.zero_init else 0.01)
        if out is self.W:  # nothing behind it starts at 0
            nn.init.zeros_(out.weight)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            part.reshape(len(x) * self.head, self.inter_channels // self.head, -1)
            for part in (self.theta(x), self.phi(x), self.g(x))
        )
        scores = queries.mT @ keys
        if self.use_scale:
            scores = scores / math.sqrt(queries.shape[1])
        y = values @ scores.softmax(-1).mT
        return self.W(y.reshape(len(x), self.inter_channels, *x.shape[2:])) + x


class NONLocalBlock1D(_NonLocalBlockND):
    def __init__(self, in_channels: int, **settings: Any):
        super().__init__(in_channels, dimension=1, **settings)


class NONLocalBlock2D(_NonLocalBlockND):
    def __init__(self, in_channels: int, **settings: Any):
        super().__init__(in_channels, dimension=2, **settings)


class NONLocalBlock3D(_NonLocalBlockND):
    def __init__(self, in_channels: int, **settings: Any):
        super().__init__(in_channels, dimension=3, **settings)


def _pointwise(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(inputs, outputs, 1), nn.BatchNorm3d(outputs), nn.ReLU(inplace=True))


def enlarged(matrix: Tensor, times: int) -> Tensor:
    """(..., n, n) -> (..., n * times, n * times): each weight becomes a multiple of the identity."""
    if times <= 1:
        return matrix
    one = torch.eye(times, dtype=matrix.dtype, device=matrix.device)
    blocks = matrix[..., :, None, :, None] * one[:, None, :]
    return blocks.flatten(-4, -3).flatten(-2, -1)


class BATransform(nn.Module):
    """(B, C, T, H, W) -> the same, for the few sizes of which the published one knows."""

    def __init__(self, in_channels: int, s: int, ts: int, k: int, tk: int):
        super().__init__()
        self.s, self.ts, self.k, self.tk, self.in_channels = s, ts, k, tk, in_channels
        self.conv1 = _pointwise(in_channels, k)
        self.conv_p = nn.Conv3d(k, k * s**2, (1, s, 1))
        self.conv_q = nn.Conv3d(k, k * s**2, (1, 1, s))
        if tk > 0:
            self.conv_t = nn.Conv3d(k, tk * ts**2, (ts, 1, 1))
        self.conv2 = _pointwise(in_channels, in_channels)

    def assembled(self, windows: Tensor, cells: int) -> Tensor:
        """Logits (B, k * s * s, T, windows) along the diagonal of (B, k, T, cells, cells); averages where they meet."""
        each = windows.unflatten(1, (self.k, self.s, self.s)).permute(0, 1, 4, 5, 2, 3)  # (B, k, T, windows, s, s)
        total = windows.new_zeros(*each.shape[:3], cells, cells)
        count = windows.new_zeros(cells, cells)
        for start, window in enumerate(each.unbind(3)):
            place = slice(start, start + self.s)
            total[..., place, place] += window
            count[place, place] += 1
        return total / count.clamp(min=1)

    def weights(self, rows: Tensor, columns: Tensor, times: Tensor | None) -> list[Tensor | None]:
        """From logits to P, Q and T."""
        return [rows.softmax(-1), columns.softmax(-2), None if times is None else times.softmax(-1)]

    def forward(self, x: Tensor) -> Tensor:
        frames, height, width = x.shape[2:]
        cells = height // (height // self.s)  # of both axes
        out = self.conv1(x)
        rows = self.conv_p(F.adaptive_max_pool3d(out, (frames, cells, 1)))[..., 0]
        columns = self.conv_q(F.adaptive_max_pool3d(out, (frames, 1, cells)))[..., 0, :]
        assert columns.shape[3] == 1 if cells == self.s else columns.shape[3] == 2  # it knows of no more
        times = None
        if self.tk > 0:
            times = self.conv_t(F.adaptive_avg_pool3d(out, (self.ts, 1, 1)))
            times = times.view(len(x), self.tk, self.ts, self.ts)
        p, q, t = self.weights(self.assembled(rows, cells), self.assembled(columns, cells), times)
        p, q = (enlarged(m, n // cells) for m, n in ((p, height), (q, width)))  # type: ignore[arg-type]
        y = p[:, :, None] @ x.unflatten(1, (self.k, -1)) @ q[:, :, None]
        y = y.flatten(1, 2)
        if t is not None:
            frames_last = y.flatten(3).unflatten(1, (self.tk, -1))  # (B, tk, C / tk, T, H * W)
            y = (enlarged(t, frames // self.ts)[:, :, None] @ frames_last).flatten(1, 2).view(x.shape)
        return self.conv2(y)


class BATBlock(NonLocalModule):
    """(B, C, T, H, W) -> the same, residual included."""

    def __init__(
        self,
        in_channels: int,
        r: int = 2,
        s: int = 7,
        ts: int = 4,
        k: int = 4,
        tk: int = 1,
        dropout: float = 0.2,
        **ignored: Any,
    ):
        super().__init__(in_channels)
        inner = in_channels // r
        self.conv1 = _pointwise(in_channels, inner)
        self.batransform = BATransform(inner, s, ts, k, tk)
        self.conv2 = _pointwise(inner, in_channels)
        self.dropout = nn.Dropout3d(dropout)

    def init_modules(self) -> None:  # type: ignore[override]
        super().init_modules(zero_bn=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.conv2(self.batransform(self.conv1(x))))


# --- networks -------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """1x1, conv2, 1x1, each with a batch norm, and the way around; on images or on clips."""

    def __init__(self, channels: int, conv2: nn.Module, dims: int, downsample: nn.Module | None = None):
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.conv1, self.bn1 = conv(channels, channels, 1, bias=False), norm(channels)
        self.conv2, self.bn2 = conv2, norm(channels)
        self.conv3, self.bn3 = conv(channels, channels, 1, bias=False), norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class RSANet(nn.Module):
    """Clips (B, 3, T, H, W) -> scores (B, classes): RSA as conv2 of bottlenecks."""

    def __init__(self, channels: int = 8, classes: int = 4, dropout: float = 0.0, **rsa: Any):
        super().__init__()
        rsa = {"nh": 2, "dk": 0, "kernel_size": (3, 3, 3), "kernel_type": "VplusR", "feat_type": "VplusR", **rsa}
        down = nn.AvgPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.conv1 = nn.Conv3d(3, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(channels)
        self.layer1 = nn.Sequential(
            Bottleneck(channels, RSA(channels, channels, **rsa), 3),
            Bottleneck(channels, nn.Conv3d(channels, channels, 3, padding=1, bias=False), 3),
        )
        self.layer2 = nn.Sequential(Bottleneck(channels, RSA(channels, channels, **rsa, stride=(1, 2, 2)), 3, down))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.dropout(x.mean((2, 3, 4))))


class BATNet(nn.Module):
    """Clips (B, 3, T, H, W) -> scores (B, classes): blocks between bottlenecks."""

    def __init__(self, channels: int = 8, classes: int = 4, dropout: float = 0.0, **bat: Any):
        super().__init__()
        bat = {"s": 3, "ts": 2, "k": 2, "tk": 2, "dropout": dropout, **bat}

        def bottleneck() -> Bottleneck:
            return Bottleneck(channels, nn.Conv3d(channels, channels, 3, padding=1, bias=False), 3)

        self.conv1 = nn.Conv3d(3, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(channels)
        self.layer2 = nn.Sequential(OrderedDict(block0=bottleneck(), nl0=BATBlock(channels, **bat)))
        self.layer3 = nn.Sequential(
            OrderedDict(block0=bottleneck(), nl0=BATBlock(channels, **{**bat, "tk": 0}), nl1=NONLocalBlock3D(channels))
        )
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3, 4)))


class Backbone(nn.Module):
    """Images (B * T, 3, H, W) -> features (B * T, channels), with dynamic regions behind conv2 of two bottlenecks."""

    def __init__(self, params: Any, channels: int, frames: int, side: int, **graph: Any):
        super().__init__()
        graph = {"H": side, "W": side, "node_dim": channels, "in_channels": channels, **graph}

        def block(dynamic: bool) -> Bottleneck:
            conv2: nn.Module = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            if dynamic:
                conv2 = nn.Sequential(SplitBT(conv2, frames), DynamicGraphWrapper(params, **graph))
            return Bottleneck(channels, conv2, 2)

        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.layer3 = nn.Sequential(block(False), block(True))
        self.layer4 = nn.Sequential(block(True))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer4(self.layer3(F.relu(self.bn1(self.conv1(x))))).mean((2, 3))


class TSN(nn.Module):
    """Clips (B, T, 3, H, W) -> scores (B, classes); `reads`: and what the graphs left on themselves, for plotting."""

    def __init__(
        self,
        params: Any | None = None,
        *,
        channels: int = 8,
        frames: int = 2,
        side: int = 7,
        classes: int = 4,
        reads: bool = False,
        **graph: Any,
    ):
        super().__init__()
        self.base_model = Backbone(params or dyregParams(offset_lstm_dim=4), channels, frames, side, **graph)
        self.new_fc = nn.Linear(channels, classes)
        self.frames, self.reads = frames, reads

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, dict[str, Any]]:
        scores = self.new_fc(self.base_model(x.flatten(0, 1))).unflatten(0, (-1, self.frames)).mean(1)
        if not self.reads:
            return scores
        seen: dict[str, Any] = {}
        for name, block in (("layer3_1", self.base_model.layer3[1]), ("layer4_0", self.base_model.layer4[0])):
            graph: Any = block.conv2[1].dynamic_graph
            seen[f"{name}_kernel"] = graph.kernel
            seen[f"{name}_offsets"] = graph.offsets / graph.H
            seen[f"{name}_nodes"] = graph.nodes_wo_position
            seen |= {f"{name}_{key}": value for key, value in graph.aux_feats.items()}
        return scores, seen
