"""Batches of point clouds as one flat graph: checks, edges, sums over nodes, edges lifted to oriented points."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.errors import InputError

log = logging.getLogger("llmcompress")


@dataclass(frozen=True)
class Graph:
    """Nodes of all graphs: x (N, c), pos (N, dim), vec (N, c_v, dim) or None, edges (2, E) senders over receivers,
    batch (N,).

    dense: the shape (B, n) and the places in it of the nodes, where they came in one.
    """

    x: Tensor
    pos: Tensor
    vec: Tensor | None
    edges: Tensor
    batch: Tensor
    count: int
    dense: tuple[int, int] | None = None
    places: Tensor | None = None

    @classmethod
    def build(
        cls,
        x: Tensor,
        pos: Tensor,
        vec: Tensor | None,
        edge_index: Tensor | None,
        batch: Tensor | None,
        mask: Tensor | None,
        dim: int,
        radius: float | None,
    ) -> Graph:
        """InputError for shapes that do not fit, no nodes, values that are not finite, or edges out of range."""
        if pos.ndim not in (2, 3) or pos.shape[-1] != dim or x.shape[:-1] != pos.shape[:-1]:
            raise InputError(
                f"pos must be (N, {dim}) or (B, n, {dim}), x of as many nodes; got {tuple(pos.shape)}, {tuple(x.shape)}"
            )
        if vec is not None and (vec.shape[:-2] != pos.shape[:-1] or vec.shape[-1] != dim):
            raise InputError(f"vec must be (..., c, {dim}) at the nodes of pos; got {tuple(vec.shape)}")
        if not all(torch.isfinite(t).all() for t in (x, pos, vec) if t is not None):
            raise InputError("x, pos or vec is not finite")
        dense, places = None, None
        if pos.ndim == 3:
            if edge_index is not None or batch is not None:
                raise InputError("dense clouds (B, n, ...) take a mask, not edge_index or batch")
            B, n = pos.shape[:2]
            keep = torch.ones(B, n, dtype=torch.bool, device=pos.device) if mask is None else mask.bool()
            if keep.shape != (B, n) or not keep.any(1).all():
                raise InputError("mask must be (B, n), and no graph empty")
            dense, places = (B, n), keep.flatten().nonzero()[:, 0]
            batch = places // n
            x, pos = x.flatten(0, 1)[places], pos.flatten(0, 1)[places]
            vec = None if vec is None else vec.flatten(0, 1)[places]
        if not len(pos):
            raise InputError("an empty graph: there are no nodes")
        if batch is None:
            batch = torch.zeros(len(pos), dtype=torch.int64, device=pos.device)
        if batch.shape != (len(pos),):
            raise InputError(f"batch must be ({len(pos)},); got {tuple(batch.shape)}")
        edges = _all_pairs(batch, pos, radius) if edge_index is None else edge_index
        if edges.ndim != 2 or len(edges) != 2:
            raise InputError(f"edge_index must be (2, E); got {tuple(edges.shape)}")
        if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < len(pos):
            raise InputError(f"edge_index is out of range: nodes are 0..{len(pos) - 1}; got {int(edges.max())}")
        if radius is not None:
            _warn_alone(edges, pos, radius)
        return cls(x, pos, vec, edges, batch, int(batch.max()) + 1, dense, places)

    def shaped(self, values: Tensor | None) -> Tensor | None:
        """Node values (N, ...) as they came: (B, n, ...) with zeros where there is no node, or flat."""
        if values is None or self.dense is None:
            return values
        found = values.new_zeros(self.dense[0] * self.dense[1], *values.shape[1:])
        return found.index_copy(0, self._places(), values).view(*self.dense, *values.shape[1:])

    def _places(self) -> Tensor:
        assert self.places is not None
        return self.places

    def total(self, values: Tensor | None) -> Tensor | None:
        """Sums over the nodes of each graph, (graphs, ...)."""
        if values is None:
            return None
        return values.new_zeros(self.count, *values.shape[1:]).index_add_(0, self.batch, values)

    def mean_at(self, base: Tensor, values: Tensor) -> Tensor:
        """Means at the nodes (N, ...) of values (L, ...) that belong to nodes base (L,); 0 at nodes without one."""
        total = values.new_zeros(len(self.pos), *values.shape[1:]).index_add_(0, base, values)
        counts = torch.bincount(base, minlength=len(self.pos)).clamp_min(1).to(values)
        return total / counts.view(-1, *[1] * (values.ndim - 1))


def _all_pairs(batch: Tensor, pos: Tensor, radius: float | None) -> Tensor:
    """Pairs of nodes of one graph, of nodes sorted or not by graph; within the radius if there is one."""
    order = batch.argsort(stable=True)
    sizes = torch.bincount(batch)
    if (sizes == sizes[0]).all():  # the usual case, without a table of all pairs of all graphs
        n = int(sizes[0])
        nodes = order.view(-1, n)
        pairs = torch.stack((nodes[:, None].expand(-1, n, -1), nodes[:, :, None].expand(-1, -1, n))).flatten(1)
    else:
        pairs = torch.cat([torch.cartesian_prod(part, part).T for part in order.split(sizes.tolist())], 1)
    if radius is None:
        return pairs
    return pairs[:, (pos[pairs[0]] - pos[pairs[1]]).norm(dim=1) < radius]


def _warn_alone(edges: Tensor, pos: Tensor, radius: float) -> None:
    sender, receiver = edges[:, edges[0] != edges[1]]
    near = (pos[sender] - pos[receiver]).norm(dim=1) < radius
    alone = len(pos) - len(receiver[near].unique())
    if alone:
        log.warning("radius %g leaves %d of %d nodes with no neighbour but themselves", radius, alone, len(pos))


def self_looped(edges: Tensor, count: int) -> Tensor:
    """The edges with one loop at every node."""
    nodes = torch.arange(count, device=edges.device)
    return torch.cat((edges[:, edges[0] != edges[1]], nodes.expand(2, -1)), 1)


def lifted(graph: Graph) -> tuple[Tensor, Tensor, Tensor]:
    """Directed edges s -> t as points at t looking at s: base nodes (L,), unit orientations (L, dim), their edges
    (2, E').

    Lifted points send to one another where their nodes are connected or the same. InputError for edges of length zero.
    """
    sender, base = graph.edges[:, graph.edges[0] != graph.edges[1]]
    d = graph.pos[sender] - graph.pos[base]
    length = d.norm(dim=1, keepdim=True)
    if not len(base) or not (length > 0).all():
        raise InputError("a lifted edge of length zero has no orientation" if len(base) else "no edges to lift")
    looped = self_looped(graph.edges, len(graph.pos))
    at = base.argsort(stable=True)  # lifted points by node
    counts = torch.bincount(base, minlength=len(graph.pos))
    first = counts.cumsum(0) - counts
    pairs = counts[looped[0]] * counts[looped[1]]
    edge = torch.repeat_interleave(torch.arange(looped.shape[1], device=base.device), pairs)
    place = torch.arange(len(edge), device=base.device) - (pairs.cumsum(0) - pairs)[edge]
    width = counts[looped[1][edge]]
    senders = at[first[looped[0][edge]] + place // width]
    receivers = at[first[looped[1][edge]] + place % width]
    return base, d / length, torch.stack((senders, receivers))
