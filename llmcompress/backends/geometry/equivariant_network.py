"""PONITA: a convolutional network on positions and orientations, equivariant under rotations and translations.

Source: arXiv 2310.02970 and its code. Messages are conditioned on what is invariant in a pair of points: without
orientations on the distance alone (PNITA); with a grid of orientations shared by all nodes by a separable kernel,
first over the neighbours, then over the orientations; or with the directions of the edges as orientations, by a
full kernel.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from llmcompress.backends.geometry.graphs import Graph, lifted, self_looped
from llmcompress.backends.geometry.position_orientation import Kind, norm, orientation_grid, pair_invariants
from llmcompress.errors import InputError

CUTOFF_POWER = 6


class KernelBasis(nn.Module):
    """Invariants (..., k) -> basis functions (..., basis): polynomials of degrees 1..degree, then two layers."""

    def __init__(self, invariants: int, hidden: int, basis: int, degree: int) -> None:
        super().__init__()
        self.degree = degree
        features = sum(invariants**power for power in range(1, degree + 1))
        self.layers = nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, basis), nn.GELU())

    def forward(self, a: Tensor) -> Tensor:
        powers = [a]
        for _ in range(self.degree - 1):
            powers.append((powers[-1][..., :, None] * a[..., None, :]).flatten(-2))
        found: Tensor = self.layers(torch.cat(powers, -1))
        return found


def polynomial_cutoff(u: Tensor) -> Tensor:
    """1 at u = 0, 0 from u = 1 on, smooth between: u is the distance over the radius."""
    p = CUTOFF_POWER
    inside = 1 - (p + 1) * (p + 2) / 2 * u**p + p * (p + 2) * u ** (p + 1) - p * (p + 1) / 2 * u ** (p + 2)
    return torch.where(u < 1, inside, torch.zeros_like(u))


class SeparableGroupConv(nn.Module):
    """Depth-wise convolution of x (N, O, C): y_i(o) = sum_j K(edge, o) x_j(o), z_i(o') = mean_o k(o, o') y_i(o), +
    bias.

    Kernels are linear in bases: spatial (E, O, basis), fibre (O, O, basis); without fibre z = y. O(E O C + N O²
    C). At the first batch of training the kernels are scaled so that no step changes the deviation; `calibrated`
    says that it is done.
    """

    calibrated: Tensor

    def __init__(self, channels: int, basis_dim: int) -> None:
        super().__init__()
        self.spatial = nn.Linear(basis_dim, channels, bias=False)
        self.fibre = nn.Linear(basis_dim, channels, bias=False)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("calibrated", torch.tensor(False))

    def forward(self, x: Tensor, edges: Tensor, spatial: Tensor, fibre: Tensor | None) -> Tensor:
        """edges (2, E): senders, receivers."""
        if self.training and not self.calibrated:
            self._calibrate(x, edges, spatial, fibre)
        y = self._gather(x, edges, spatial)
        return (y if fibre is None else self._mix(y, fibre)) + self.bias

    def _gather(self, x: Tensor, edges: Tensor, spatial: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add_(0, edges[1], self.spatial(spatial) * x.index_select(0, edges[0]))

    def _mix(self, y: Tensor, fibre: Tensor) -> Tensor:
        return torch.einsum("opc,noc->npc", self.fibre(fibre), y) / y.shape[1]

    @torch.no_grad()
    def _calibrate(self, x: Tensor, edges: Tensor, spatial: Tensor, fibre: Tensor | None) -> None:
        y = self._gather(x, edges, spatial)
        if x.std() > 0 and y.std() > 0:
            self.spatial.weight *= x.std() / y.std()
            if fibre is not None:
                y = self._gather(x, edges, spatial)
                z = self._mix(y, fibre)
                self.fibre.weight *= y.std() / z.std().clamp_min(1e-12)
        self.calibrated.fill_(True)


class _Block(nn.Module):
    def __init__(self, hidden: int, basis: int, widening: int, layer_scale: float | None) -> None:
        super().__init__()
        self.convolution = SeparableGroupConv(hidden, basis)
        self.mlp = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, widening * hidden), nn.GELU(), nn.Linear(widening * hidden, hidden)
        )
        self.scale = None if layer_scale is None else nn.Parameter(torch.full((hidden,), layer_scale))

    def forward(self, x: Tensor, edges: Tensor, spatial: Tensor, fibre: Tensor | None) -> Tensor:
        y: Tensor = self.mlp(self.convolution(x, edges, spatial, fibre))
        return x + (y if self.scale is None else self.scale * y)


class Ponita(nn.Module):
    """Point clouds -> invariant scalars and equivariant vectors, per node or summed over a graph.

    num_ori: orientations of the grid; 0 for distances alone (no vector inputs; vector outputs are sums of
    differences of positions); -1 for the directions of the edges, exactly equivariant. grid: kind of the grid in
    space (a circle in the plane). A finite grid is only approximately equivariant; it is exact under its own
    symmetries, or if it turns along. radius: kernels fade to zero there. universal: all invariants of a pair, with
    num_ori = -1 alone.
    """

    orientations: Tensor

    def __init__(
        self,
        in_scalar: int,
        in_vector: int,
        hidden: int,
        out_scalar: int,
        out_vector: int,
        num_layers: int = 5,
        num_ori: int = 20,
        basis_dim: int | None = None,
        degree: int = 3,
        widening: int = 4,
        radius: float | None = None,
        task: Literal["node", "graph"] = "node",
        layer_scale: float | None = None,
        universal: bool = False,
        *,
        dim: int = 3,
        grid: Kind = "repulsion",
        generator: torch.Generator | None = None,
    ) -> None:
        """InputError for sizes and combinations that do not fit."""
        super().__init__()
        if dim not in (2, 3):
            raise InputError(f"positions must be 2-D or 3-D; got dim {dim}")
        if num_ori == 0 and in_vector:
            raise InputError("PNITA cannot take vectors: num_ori = 0 sees distances alone")
        if num_ori < -1 or in_scalar + in_vector < 1 or min(hidden, num_layers, degree) < 1:
            raise InputError("num_ori must be at least -1, inputs, hidden, num_layers and degree at least 1")
        if radius is not None and not radius > 0:
            raise InputError(f"radius must be positive; got {radius}")
        if universal and (num_ori != -1 or dim != 3):
            raise InputError(
                "universal: a separable kernel cannot use these invariants; it needs num_ori = -1 in space"
            )
        if task not in ("node", "graph"):
            raise InputError(f"task must be node or graph; got '{task}'")
        self.num_ori, self.radius, self.task, self.dim, self.universal = num_ori, radius, task, dim, universal
        self.in_vector, self.out_scalar, self.out_vector = in_vector, out_scalar, out_vector
        basis = basis_dim or hidden
        if num_ori > 0:
            points = orientation_grid(num_ori, "circle" if dim == 2 else grid, generator)
            self.register_buffer("orientations", points)  # float64: a rounded grid loses its symmetry
            self.fibre_basis = KernelBasis(1, hidden, basis, degree)
        invariants = {0: 1, -1: 5 if universal else 3}.get(num_ori, 2)
        self.spatial_basis = KernelBasis(invariants, hidden, basis, degree)
        self.embed = nn.Linear(in_scalar + in_vector, hidden, bias=False)
        self.blocks = nn.ModuleList(_Block(hidden, basis, widening, layer_scale) for _ in range(num_layers))
        self.readouts = nn.ModuleList(nn.Linear(hidden, out_scalar + out_vector) for _ in range(num_layers))
        self.differences = nn.Linear(basis, out_vector, bias=False) if num_ori == 0 and out_vector else None

    def forward(
        self,
        x: Tensor,
        pos: Tensor,
        vec: Tensor | None = None,
        edge_index: Tensor | None = None,
        batch: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Scalars (..., out_scalar) or None, vectors (..., out_vector, dim) or None.

        Dense: x (B, n, c), pos (B, n, dim), vec (B, n, c_v, dim), mask (B, n) true at nodes. Flat: x (N, c), pos
        (N, dim), with edge_index (2, E), senders over receivers, and batch (N,) the graph of each node; without
        edges all pairs of a graph, within the radius if there is one. Self-loops are added. InputError for
        malformed input.
        """
        if (vec is None) != (self.in_vector == 0):
            raise InputError(f"vec: the network takes {self.in_vector} vectors a node")
        graph = Graph.build(x, pos, vec, edge_index, batch, mask, self.dim, self.radius)
        scalar, vector = self._lifted(graph) if self.num_ori == -1 else self._convolved(graph)
        if self.task == "graph":
            return graph.total(scalar), graph.total(vector)
        return graph.shaped(scalar), graph.shaped(vector)

    # --- a shared grid, or none --------------------------------------------------------------------------------------

    def _convolved(self, graph: Graph) -> tuple[Tensor | None, Tensor | None]:
        edges = self_looped(graph.edges, len(graph.pos))
        d = graph.pos[edges[0]] - graph.pos[edges[1]]
        if self.num_ori == 0:
            grid = None
            spatial = self.spatial_basis(norm(d)[:, None, None])
            fibre, features = None, graph.x[:, None]
        else:
            grid = self.orientations.to(graph.pos)
            zero = torch.zeros_like(d)
            space: Literal["r2s1", "r3s2"] = "r2s1" if self.dim == 2 else "r3s2"
            attributes = pair_invariants(zero[:, None], grid[None], d[:, None], grid[None], space)[..., :2]
            spatial = self.spatial_basis(attributes)
            fibre = self.fibre_basis((grid @ grid.T)[..., None])
            features = graph.x[:, None].expand(-1, len(grid), -1)
            if graph.vec is not None:
                features = torch.cat((features, torch.einsum("ncd,od->noc", graph.vec, grid)), -1)
        spatial = self._cut(spatial, d)
        found = self._run(features, edges, spatial, fibre)
        scalar, f = found[..., : self.out_scalar].mean(1), found[..., self.out_scalar :]
        vector = None
        if self.out_vector and grid is not None:
            vector = torch.einsum("noc,od->ncd", f, grid) / len(grid)
        elif self.differences is not None:
            gate = (self.differences(spatial) * f[edges[0]])[:, 0, :, None] * d[:, None]
            vector = gate.new_zeros(len(graph.pos), self.out_vector, self.dim).index_add_(0, edges[1], gate)
        return (scalar if self.out_scalar else None), vector

    def _cut(self, spatial: Tensor, d: Tensor) -> Tensor:
        if self.radius is None:
            return spatial
        return spatial * polynomial_cutoff(norm(d) / self.radius)[:, None, None]

    def _run(self, features: Tensor, edges: Tensor, spatial: Tensor, fibre: Tensor | None) -> Tensor:
        """(N, O, out): the mean of the readouts after every block."""
        hidden = self.embed(features)
        total: Tensor | None = None
        for block, readout in zip(self.blocks, self.readouts, strict=True):
            hidden = block(hidden, edges, spatial, fibre)
            total = readout(hidden) if total is None else total + readout(hidden)
        assert total is not None
        return total / len(self.blocks)

    # --- edges as orientations ---------------------------------------------------------------------------------------

    def _lifted(self, graph: Graph) -> tuple[Tensor | None, Tensor | None]:
        base, ori, edges = lifted(graph)
        pos, features = graph.pos[base], graph.x[base]
        if graph.vec is not None:
            features = torch.cat((features, torch.einsum("ncd,nd->nc", graph.vec[base], ori)), -1)
        sender, receiver = edges
        space: Literal["r2s1", "r3s2"] = "r2s1" if self.dim == 2 else "r3s2"
        attributes = pair_invariants(pos[receiver], ori[receiver], pos[sender], ori[sender], space, self.universal)
        spatial = self._cut(self.spatial_basis(attributes)[:, None], pos[sender] - pos[receiver])
        found = self._run(features[:, None], edges, spatial, None)[:, 0]
        scalar = graph.mean_at(base, found[:, : self.out_scalar])
        vector = graph.mean_at(base, found[:, self.out_scalar :, None] * ori[:, None])
        return (scalar if self.out_scalar else None), (vector if self.out_vector else None)
