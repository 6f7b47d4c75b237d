"""Dynamic regions layer (DyReG: Duta et al., 'Dynamic Regions Graph Neural Networks', equations 1-10)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from .._core.autocast import full_precision
from .._core.validation import choice, flag, layer_input, pair, positive_int, positive_number, profile_arguments
from ..ops.region import pool_placed
from ..pretrained import Pretrained
from .generators import Fishnet, GloRe, node_weights
from .leaves import first_readable, in_full_precision, readable, tensor_of
from .norms import ChannelAffineNorm
from .recurrence import RECURRENCES, over_time
from .recurrence import recurrence as make_recurrence
from .regions import INITS, RULES, initial_centers, regions_from_centers
from .rstg import RSTG
from .variants import REGIONS, VARIANTS, Variant

GENERATORS = ("fc", "pooled")
CONNECTIONS = ("residual", "serial")
GRAPH_OPTIONS = ("iterations", "combine", "send_layers", "update_layers", "aggregation", "order")

# What the published code does where it departs from the paper, as options of `DyReG`.
PUBLISHED: dict[str, Any] = {
    "recurrence": "lstm",
    "region_rule": "published",
    "offset_bias": True,
    "weights_over": "nodes",
    "combine": "sum",
    "send_layers": 1,
    "update_layers": 0,
    "order": "time-space",
}


class DynamicGraph(nn.Module):
    """The branch inside `DyReG`: predict regions, pool nodes, pass messages, map the nodes back.

    Takes the arguments of `DyReG`. x (B, T, C, H, W) -> (y of x's shape, regions (B, T, N, 4)).
    """

    def __init__(
        self,
        in_channels: int,
        size: tuple[int, int],
        *,
        grid: tuple[int, int] = (3, 3),
        node_channels: int | None = None,
        project: bool | None = None,
        regions: str = "full",
        size_ratio: float | None = None,
        region_channels: int = 32,
        generator: str = "fc",
        weights_over: str = "locations",
        init: str | None = None,
        region_rule: str = "paper",
        offset_bias: bool = False,
        recurrence: str = "gru",
        profile: str = "linear",
        temperature: float = 1.0,
        train_size: tuple[int, int] | None = None,
        **graph: Any,
    ):
        super().__init__()
        op = "DyReG"
        unknown = sorted(set(graph) - set(GRAPH_OPTIONS))
        if unknown:
            raise TypeError(f"{op}: unknown arguments {unknown}; help(dyreg_triton.layers.DyReG) lists those accepted")
        self.in_channels = in_channels = positive_int(op, "in_channels", in_channels)
        self.channels = positive_int(op, "node_channels", in_channels if node_channels is None else node_channels)
        self.size = pair(op, "size", size)
        self.grid = pair(op, "grid", grid)
        self.train_size = self.size if train_size is None else pair(op, "train_size", train_size)
        self.variant = VARIANTS.get(choice(op, "regions", regions, REGIONS))
        self.size_ratio = None if size_ratio is None else positive_number(op, "size_ratio", size_ratio)
        self.init = choice(op, "init", ("grid" if regions == "grid" else "center") if init is None else init, INITS)
        self.region_rule = choice(op, "region_rule", region_rule, RULES)
        profile_arguments(op, profile, temperature)
        self.profile, self.temperature = profile, temperature
        self.generator = choice(op, "generator", generator, GENERATORS)
        self.weights_over = choice(op, "weights_over", weights_over, ("locations", "nodes"))
        choice(op, "recurrence", recurrence, RECURRENCES)
        region_channels = positive_int(op, "region_channels", region_channels)
        flag(op, "offset_bias", offset_bias)
        least = min(self.train_size)
        if generator == "fc" and self.variant is not None and self.variant.sees and least < 3:
            name = "size" if train_size is None else "train_size"
            raise ValueError(
                f"{op}: {name} is {self.train_size}; accepted by generator 'fc' is at least 3 cells on each side"
            )
        self.project = self.channels != in_channels if project is None else flag(op, "project", project)
        if not self.project and self.channels != in_channels:
            raise ValueError(
                f"{op}: project is False with in_channels {in_channels} and node_channels {self.channels}; "
                "accepted without projection are equal channels"
            )
        self.num_nodes = self.grid[0] * self.grid[1]

        self.rstg = RSTG(self.channels, recurrence=recurrence, **graph)
        self.norm_dict = nn.ModuleDict()
        if self.project:
            self.project_i3d_linear = nn.Conv2d(in_channels, self.channels, 1)
            self.project_back_i3d_linear = nn.Conv2d(self.channels, in_channels, 1)
            self.norm_dict["dynamic_graph_projection"] = ChannelAffineNorm((1, self.channels, 1, 1), 3)
        if self.variant is None:
            self.semantic_conv = nn.Conv2d(self.channels, self.num_nodes, 1)
        elif self.variant.moves:
            self._add_generator(self.variant, recurrence, region_channels, offset_bias)
        self.kernel_projection1 = nn.Linear(self.train_size[0] * self.train_size[1], self.channels)

    def _add_generator(self, variant: Variant, recurrence: str, region_channels: int, offset_bias: bool) -> None:
        """The parts that lead to offsets: latent vectors (learned, or predicted and carried over time), linear map."""
        if not variant.sees:
            self.region_latent = nn.Parameter(torch.randn(self.num_nodes, region_channels))
        elif self.generator == "fc":
            self.fishnet = Fishnet(self.channels, self.train_size)
            # as wide as its input: a fully connected layer per node, output channel = node * region_channels + d
            self.global_conv = nn.Sequential(nn.Conv2d(16, self.num_nodes * region_channels, self.fishnet.size))
        else:
            self.glore = GloRe(self.channels, self.train_size, self.num_nodes, region_channels, self.weights_over)
        if variant.in_time:
            self.offset_lstm = make_recurrence(recurrence, region_channels)
        self.offset_pred = nn.Linear(region_channels, 4, bias=offset_bias)
        self.offset_alpha = nn.Parameter(torch.zeros(4))
        if variant.sees:
            self.norm_dict["offset_ln_feats_coords"] = ChannelAffineNorm((region_channels,), 2)
        if variant.in_time:
            self.norm_dict["offset_ln_lstm"] = ChannelAffineNorm((region_channels,), 2)

    def initial_centers(self, device: torch.device | None) -> Tensor:
        """(N, 2) = (x, y) in cells: where the nodes start. No buffer: `.half()` would move it, `to_empty` lose it."""
        return initial_centers(self.grid, self.size, self.init, device)

    def latent(self, features: Tensor) -> Tensor:
        """One latent vector per node from the features (B, T, C, H, W): (B, T, N, D); T is 1 for "constant_time"."""
        if not cast(Variant, self.variant).in_time:
            wide = torch.promote_types(features.dtype, torch.float32)  # 16 bits do not hold the sum of many frames
            mean = features.sum(1, keepdim=True, dtype=wide) / max(features.shape[1], 1)  # 0 of no frames
            features = mean.to(features.dtype)
        maps = features.flatten(0, 1)
        if self.train_size != self.size:
            maps = F.adaptive_avg_pool2d(maps, self.train_size)
        if self.generator == "fc":
            maps, conv = self.fishnet(maps), self._fully_connected()
            if conv is None:
                maps = self.global_conv(maps).flatten(1)
            else:
                maps = F.linear(maps.flatten(1), conv.weight.flatten(1), conv.bias)
            latent = maps.unflatten(1, (self.num_nodes, -1))
        else:
            latent = self.glore(maps)
        latent = self.norm_dict["offset_ln_feats_coords"](latent).unflatten(0, features.shape[:2])
        if not cast(Variant, self.variant).in_time:
            return latent
        return self.norm_dict["offset_ln_lstm"](over_time(self, "offset_lstm", latent))

    def _fully_connected(self) -> nn.Conv2d | None:
        """The convolution over the whole map where it may be read; the published pool after it has one cell to pool."""
        conv = first_readable(self.global_conv, nn.Conv2d)
        rest = list(cast(nn.Sequential, self.global_conv))[1:] if conv is not None else []
        return conv if all(readable(part, nn.AdaptiveAvgPool2d) is not None for part in rest) else None

    def raw_offsets(self, features: Tensor) -> Tensor:
        """(log h, log w, dy, dx) of each node as predicted, float32 or wider: (B, T, N, 4), or what expands to it."""
        variant = cast(Variant, self.variant)
        wide = torch.promote_types(features.dtype, torch.float32)
        if not variant.moves:
            return torch.zeros(self.num_nodes, 4, dtype=wide, device=features.device)
        latent = self.latent(features) if variant.sees else self.region_latent
        with full_precision(features.device.type):  # a lowered region moves its nodes by percents
            wide, linear = torch.promote_types(latent.dtype, torch.float32), readable(self.offset_pred, nn.Linear)
            if linear is None:
                offsets = in_full_precision(self.offset_pred, latent).to(wide)
            else:
                bias = linear.bias
                offsets = F.linear(latent.to(wide), linear.weight.to(wide), None if bias is None else bias.to(wide))
            offsets = offsets * self.offset_alpha.to(wide)
            return offsets if variant.grows else F.pad(offsets[..., 2:], (2, 0))

    def regions(self, features: Tensor) -> Tensor:
        """Regions (B, T, N, 4) = (cx, cy, w, h) of the features (B, T, C, H, W), never below float32.

        For "semantic" the maps (B, T, N, H, W) that take their place.
        """
        if self.variant is None:
            scores = self.semantic_conv(features.flatten(0, 1))
            return node_weights(scores, self.weights_over).unflatten(0, features.shape[:2])
        regions = regions_from_centers(
            self.raw_offsets(features),
            self.initial_centers(features.device),
            grid=self.grid,
            size=self.size,
            rule=self.region_rule,
            size_ratio=self.size_ratio,
        )
        return regions.expand(*features.shape[:2], -1, -1)

    def kernels(self, regions: Tensor) -> Tensor:
        """What each node pools with, (B, T, N, H, W), from what `regions` gave."""
        if self.variant is None:
            return regions
        return ops.region_kernel(regions, self.size, profile=self.profile, temperature=self.temperature)

    def position_map(self) -> Tensor:
        """The position embedding as a map (C, H, W): a linear map of a kernel is a pooling with that kernel.

        K W^T = pool(W.view(C, H, W)). At another size than the training one the kernel is averaged down first, which
        is linear too: its adjoint carries W up to this size.
        """
        weight = self.kernel_projection1.weight.unflatten(1, self.train_size)
        for axis, (large, small) in enumerate(zip(self.size, self.train_size, strict=True)):
            if large != small:
                with full_precision(weight.device.type):
                    identity = torch.eye(large, dtype=weight.dtype, device=weight.device)
                    average = F.adaptive_avg_pool1d(identity, small)  # (large, small): what each large cell gives
                    weight = torch.tensordot(weight, average, dims=([1 + axis], [1])).movedim(-1, 1 + axis)
        return weight

    def project_in(self, x: Tensor) -> Tensor:
        """The features that nodes are pooled from: x (B, T, C, H, W), projected where the layer projects."""
        shape = (None, None, self.in_channels, *self.size)
        form = f"(B, T, {', '.join(map(str, shape[2:]))}) for in_channels {self.in_channels} and size {self.size}"
        layer_input("DyReG", "x", x, tensor_of(self.kernel_projection1, self), shape, form)
        if not self.project:
            return x
        return self.norm_dict["dynamic_graph_projection"](self.project_i3d_linear(x.flatten(0, 1))).unflatten(
            0, x.shape[:2]
        )

    def pool(self, features: Tensor, regions: Tensor) -> Tensor:
        """The nodes before message passing, (B, T, N, node_channels)."""
        embed = readable(self.kernel_projection1, nn.Linear)
        if self.variant is None:
            maps = features if embed is None else features + self.position_map()
            nodes = regions.to(features.dtype).flatten(-2) @ maps.flatten(-2).mT
        elif embed is not None:
            nodes = pool_placed(features, self.position_map(), regions, self.profile, self.temperature)
        else:
            nodes = ops.region_pool(features, regions, profile=self.profile, temperature=self.temperature)
        if embed is not None:
            return nodes if embed.bias is None else nodes + embed.bias.to(nodes.dtype)
        kernels = self.kernels(regions).to(features.dtype)
        if self.train_size != self.size:
            kernels = F.adaptive_avg_pool2d(kernels.flatten(0, 1), self.train_size).unflatten(0, kernels.shape[:2])
        return nodes + self.kernel_projection1(kernels.flatten(-2)).to(nodes.dtype)

    def reason(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The nodes after message passing (B, T, N, node_channels), and the regions (B, T, N, 4)."""
        features = self.project_in(x)
        regions = self.regions(features)
        return self.rstg(self.pool(features, regions)), regions

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        nodes, regions = self.reason(x)
        back = readable(self.project_back_i3d_linear, nn.Conv2d) if self.project else None
        if back is not None:  # on N nodes, not on H*W cells; the bias stays outside, for the kernels do not sum to one
            nodes = F.linear(nodes, back.weight.flatten(1))
        if self.variant is None:
            y = (nodes.mT @ regions.to(nodes.dtype).flatten(-2)).unflatten(-1, self.size)
        else:
            y = ops.region_remap(nodes, regions, self.size, profile=self.profile, temperature=self.temperature)
        if back is not None:
            y = y if back.bias is None else y + back.bias.to(y.dtype).view(-1, 1, 1)
        elif self.project:
            y = self.project_back_i3d_linear(y.flatten(0, 1)).unflatten(0, y.shape[:2])
        return y, regions


class DyReG(Pretrained):
    """x + norm(branch(x)): a residual layer that finds N regions, reasons over them and writes them back.

    Per frame: a generator predicts N regions from the whole map (equations 1-4), features are pooled from them
    (equation 7) and given a linear embedding of their kernel, a space-time graph passes messages (equations 8-9, see
    `RSTG`), and the nodes are mapped back onto their regions (equation 10). The branch ends in a layer norm whose
    scale starts at 0, so the layer starts as the identity. Defaults follow the paper; `layers.dyreg.PUBLISHED` holds
    the options of the published code where it departs from it.

    Args:
        in_channels: channels C of the map.
        size: (H, W) of the map.
        grid: (rows, columns) of nodes.
        node_channels: channels of a node; other than C, the map is projected by a 1x1 convolution and back.
        project: project even between equal channels; by default only between different ones.
        regions: what decides them (section 4.1 and appendix B.2 of the paper):
            "full"           places and sizes, from the input, in every frame
            "position"       places, from the input, in every frame; sizes fixed. Same parameters as "full"
            "constant_time"  places, from the clip's features averaged over time, without a recurrence; sizes fixed
            "static"         places learned for all inputs and frames alike; sizes fixed
            "grid"           nothing: places and sizes fixed
            "semantic"       no regions: a 1x1 convolution of the features weighs every location for each node, and
                             pooling and re-mapping use these maps; the paper leaves their normalisation open, here
                             it is a softmax, see `weights_over`
        size_ratio: lambda: regions start with half-extents (H, W) / lambda, and keep them where sizes are fixed
            (appendix B.3; lambda = H is bilinear interpolation). By default what `region_rule` says, 6 in the paper.
        region_channels: size D of the latent vector that predicts a region.
        generator: "fc" (convolutions and a fully connected layer per node) or "pooled" (Lite: weighted pooling).
        weights_over: "locations" or "nodes": what the weights of "pooled" and "semantic" are normalised over.
        init: regions start in the "center" of the map or on a "grid"; by default on a grid for regions="grid".
        region_rule: "paper" or "published", see `regions_from_offsets`.
        offset_bias: whether the last linear map to the offsets has a bias.
        recurrence: "gru" or "lstm", for the regions and the graph.
        profile, temperature: of the kernel, see `dt.ops.region_kernel`.
        train_size: the map's size at training time, for evaluating at another one: the generator's input and the
            embedded kernels are averaged to it, so that parameters fit.
        iterations, combine, send_layers, update_layers, aggregation, order: of the graph, see `RSTG`.
        connection: "residual", or "serial": norm(branch(x)) alone, whose scale starts at 1.
        return_regions: whether a call returns the regions too; a call may say otherwise.

    Shapes: x (B, T, C, H, W), any strides -> the same; with return_regions=True also regions (B, T, N, 4) =
    (cx, cy, w, h) in cells, float32 or wider; for "semantic" the maps (B, T, N, H, W) that take their place.

    An option that the chosen `regions` have no use for is checked and then not looked at: of the generator, where they
    do not see the input; of the kernel and its start, where they are maps.

    Raises ValueError or TypeError for an argument outside those named, and for x of another shape.
    """

    def __init__(
        self,
        in_channels: int,
        size: tuple[int, int],
        *,
        connection: str = "residual",
        return_regions: bool = False,
        **options: Any,
    ):
        super().__init__()
        self.connection = choice("DyReG", "connection", connection, CONNECTIONS)
        self.return_regions = flag("DyReG", "return_regions", return_regions)
        self.dynamic_graph = DynamicGraph(in_channels, size, **options)
        start = 0.0 if connection == "residual" else 1.0
        self.norm_dict = nn.ModuleDict({"residual_norm": ChannelAffineNorm((1, in_channels, 1, 1), 3, start=start)})

    def nodes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The nodes after message passing (B, T, N, node_channels), and the regions (B, T, N, 4)."""
        return self.dynamic_graph.reason(x)

    def kernels(self, x: Tensor) -> Tensor:
        """What each node pools with, for a look at it: (B, T, N, H, W)."""
        return self.dynamic_graph.kernels(self.dynamic_graph.regions(self.dynamic_graph.project_in(x)))

    def forward(self, x: Tensor, *, return_regions: bool | None = None) -> Tensor | tuple[Tensor, Tensor]:
        wanted = self.return_regions if return_regions is None else flag("DyReG", "return_regions", return_regions)
        y, regions = self.dynamic_graph(x)
        y = self.norm_dict["residual_norm"](y.flatten(0, 1)).unflatten(0, x.shape[:2])
        if self.connection == "residual":
            y = x + y
        return (y, regions) if wanted else y
