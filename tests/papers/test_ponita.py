"""PONITA: invariants of pairs, grids, equivariance, separable kernels, five charges, and weights as clouds."""

import json
import logging
import math
import time

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import nn

from llmcompress.analyze import analyze_model, build_analysis, gather
from llmcompress.backends.geometry.equivariant_network import KernelBasis, polynomial_cutoff
from llmcompress.backends.geometry.ponita import (
    Ponita,
    SeparableGroupConv,
    orientation_grid,
    pair_invariants,
)
from llmcompress.errors import InputError
from tests.tiny import save_tiny, write_text


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def unit(*shape, seed=0):
    return nn.functional.normalize(randn(*shape, seed=seed), dim=-1)


def rotation(seed=0):
    return torch.from_numpy(Rotation.random(rng=np.random.default_rng(seed)).as_matrix())


# --- invariants ------------------------------------------------------------------------------------------------------


def frames(seed):
    return torch.from_numpy(Rotation.random(rng=np.random.default_rng(seed)).as_matrix())


@pytest.mark.parametrize(("space", "universal", "rank"), [
    ("rn", False, 1), ("r3s2", False, 3), ("r3s2", True, 4), ("se3", False, 6),
])  # fmt: skip
def test_invariants_are_invariant_and_tell_so_many_dimensions(space, universal, rank):
    p, q = randn(3, seed=1), randn(3, seed=2)
    pair = (frames(3), frames(4)) if space == "se3" else (unit(3, seed=3), unit(3, seed=4))
    R, t = rotation(5), randn(3, seed=6)

    def value(p, q, a, b):
        return pair_invariants(p, a, q, b, space, universal)

    turned = [R @ o for o in pair]
    assert float((value(R @ p + t, R @ q + t, *turned) - value(p, q, *pair)).abs().max()) <= 1e-12
    generators = torch.zeros(3, 3, 3, dtype=torch.float64)
    for axis in range(3):
        generators[axis, (axis + 2) % 3, (axis + 1) % 3], generators[axis, (axis + 1) % 3, (axis + 2) % 3] = 1, -1

    def moved(z):
        """Positions shifted and orientations turned by z (12,), staying on their manifold."""
        turn = [
            torch.linalg.matrix_exp(torch.einsum("a,aij->ij", z[6 + 3 * k : 9 + 3 * k], generators)) for k in (0, 1)
        ]
        return value(p + z[:3], q + z[3:6], turn[0] @ pair[0], turn[1] @ pair[1])

    jacobian = torch.autograd.functional.jacobian(moved, torch.zeros(12, dtype=torch.float64))
    assert int((torch.linalg.svdvals(jacobian) > 1e-9).sum()) == rank
    if space == "se3":
        return
    twist = torch.from_numpy(Rotation.from_rotvec(0.8 * pair[0].numpy()).as_matrix())
    change = float((value(p, q, pair[0], twist @ pair[1]) - value(p, q, *pair)).abs().max())
    assert change > 1e-2 if universal else change <= 1e-12


def test_invariants_of_the_plane():
    p, q, a, b = randn(2, seed=1), randn(2, seed=2), unit(2, seed=3), unit(2, seed=4)
    R = torch.tensor([[math.cos(1.1), -math.sin(1.1)], [math.sin(1.1), math.cos(1.1)]], dtype=torch.float64)
    plain = pair_invariants(p, a, q, b, "r2s1")
    torch.testing.assert_close(pair_invariants(R @ p, R @ a, R @ q, R @ b, "r2s1"), plain)
    assert plain[0] ** 2 + plain[1] ** 2 == pytest.approx(float((q - p).square().sum()))


# --- grids -----------------------------------------------------------------------------------------------------------


def least_angle(points):
    cosine = points @ points.T - 2 * torch.eye(len(points))
    return math.degrees(math.acos(float(cosine.max())))


def second_moment(points):
    return float((points.T @ points / len(points) - torch.eye(3).double() / 3).norm())


def test_grids_are_spread():
    icosahedron, dodecahedron = orientation_grid(12, "icosahedron"), orientation_grid(20, "dodecahedron")
    assert least_angle(icosahedron) == pytest.approx(63.43, abs=0.01)
    assert least_angle(dodecahedron) == pytest.approx(41.81, abs=0.01)
    assert max(second_moment(icosahedron), second_moment(dodecahedron)) <= 1e-12
    for seed in range(3):
        twelve, twenty = (orientation_grid(n, generator=generator(seed)) for n in (12, 20))
        print(least_angle(twelve), least_angle(twenty), second_moment(twenty))
        assert least_angle(twenty) >= 40
        assert least_angle(twelve) >= 52
        assert second_moment(twenty) <= 0.01
    assert orientation_grid(7, "circle").shape == (7, 2)


# --- equivariance ----------------------------------------------------------------------------------------------------


def network(num_ori, seed=0, **options):
    torch.manual_seed(seed)
    options = {"grid": "repulsion", "in_vector": 1 if num_ori else 0, **options}
    net = Ponita(2, options.pop("in_vector"), 8, 1, 1, 3, num_ori, generator=generator(1), **options).double().eval()
    with torch.no_grad():
        for block in net.blocks:  # an untrained network is nearly flat
            block.convolution.spatial.weight *= 3
    return net


def outputs(net, x, pos, vec):
    with torch.no_grad():
        return net(x, pos, vec if net.in_vector else None)


X, POS, VEC = randn(2, 6, 2, seed=1), randn(2, 6, 3, seed=2), randn(2, 6, 1, 3, seed=3)


def gap(net, R):
    """Relative change of scalars and vectors under a rotation of the input, turned back."""
    plain, turned = outputs(net, X, POS, VEC), outputs(net, X, POS @ R.T, VEC @ R.T)
    return max(float((turned[0] - plain[0]).norm() / plain[0].norm()),
               float((turned[1] - plain[1] @ R.T).norm() / plain[1].norm()))  # fmt: skip


@pytest.mark.parametrize(("n", "kind"), [(12, "icosahedron"), (20, "dodecahedron")])
def test_a_platonic_grid_is_exact_under_its_own_rotations(n, kind):
    net = network(n, grid=kind)
    group = torch.from_numpy(Rotation.create_group("I").as_matrix())
    grid = orientation_grid(12, "icosahedron")
    turn = next(  # the grid may stand in another position than the group's own
        R for R in (torch.eye(3, dtype=torch.float64), torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]]).double())
        if all(float((grid @ R.T @ g.T @ R @ grid.T).max(1).values.min()) > 1 - 1e-9 for g in group)
    )  # fmt: skip
    assert len(group) == 60
    assert max(gap(net, turn.T @ g @ turn) for g in group) <= 1e-12
    assert gap(net, rotation(3)) > 1e-6, "not under any other"


def test_a_grid_that_turns_along_is_exact():
    net, R = network(9), rotation(2)
    plain = outputs(net, X, POS, VEC)
    net.orientations.copy_(net.orientations @ R.T)
    turned = outputs(net, X, POS @ R.T, VEC @ R.T)
    assert float((turned[0] - plain[0]).abs().max() / plain[0].abs().max()) <= 1e-12
    assert float((turned[1] - plain[1] @ R.T).abs().max() / plain[1].abs().max()) <= 1e-12


@pytest.mark.parametrize("options", [{"num_ori": 0}, {"num_ori": -1}, {"num_ori": -1, "universal": True}])
def test_distances_and_lifted_edges_are_exact_under_any_rotation(options):
    net = network(**options)
    assert gap(net, rotation(1)) <= 1e-12
    assert float(outputs(net, X, POS, VEC)[1].norm()) > 1e-3


@pytest.mark.parametrize("num_ori", [-1, 0, 12])
def test_translations_and_permutations(num_ori):
    net = network(num_ori)
    plain = outputs(net, X, POS, VEC)
    order = torch.randperm(6, generator=generator(4))
    for found, expected in (
        (outputs(net, X, POS + 5, VEC), plain),
        (outputs(net, X[:, order], POS[:, order], VEC[:, order]), [part[:, order] for part in plain]),
    ):
        for a, b in zip(found, expected, strict=True):
            assert float((a - b).abs().max() / b.abs().max()) <= 1e-12
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    with torch.no_grad():
        masked = net(X, POS, VEC if net.in_vector else None, mask=mask)
        alone = net(X[:1, :4], POS[:1, :4], VEC[:1, :4] if net.in_vector else None)
    torch.testing.assert_close(masked[0][:1, :4], alone[0])
    assert not masked[1][0, 4:].any()


def test_a_finer_grid_is_more_equivariant():
    errors = {}
    for n in (8, 20, 50):
        errors[n] = float(np.mean([gap(network(n), rotation(seed)) for seed in range(4)]))
    print(errors)
    assert errors[50] <= 0.25 * errors[8]
    assert errors[20] < errors[8]


def test_the_plane():
    net = network(16, dim=2)
    x, pos, vec = X, POS[..., :2], VEC[..., :2]
    angle = 2 * math.pi * 3 / 16
    R = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    plain, turned = outputs(net, x, pos, vec), outputs(net, x, pos @ R.T, vec @ R.T)
    torch.testing.assert_close(turned[0], plain[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(turned[1], plain[1] @ R.T, rtol=1e-10, atol=1e-12)


def test_graphs_are_sums_and_edges_are_respected():
    net = network(8, task="graph")
    node = network(8)
    with torch.no_grad():
        total, per_node = net(X, POS, VEC), node(X, POS, VEC)
        flat = net(X.flatten(0, 1), POS.flatten(0, 1), VEC.flatten(0, 1), batch=torch.arange(2).repeat_interleave(6))
        alone = node(X[0], POS[0], VEC[0], edge_index=torch.zeros(2, 0, dtype=torch.int64))
        single = node(X[0, :1], POS[0, :1], VEC[0, :1])
    torch.testing.assert_close(total[0], per_node[0].sum(1))
    torch.testing.assert_close(flat[0], total[0])
    torch.testing.assert_close(flat[1], total[1])
    torch.testing.assert_close(alone[0][:1], single[0])


# --- the kernel ------------------------------------------------------------------------------------------------------


def test_the_separable_kernel_is_a_full_one_that_factors():
    O, n, C, basis = 20, 24, 16, 16
    layer = SeparableGroupConv(C, basis).eval()
    x = torch.randn(n, O, C, generator=generator())
    edges = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
    spatial, fibre = (
        torch.randn(n * n, O, basis, generator=generator(1)),
        torch.randn(O, O, basis, generator=generator(2)),
    )
    with torch.no_grad():
        start = time.process_time()
        separable = layer(x, edges, spatial, fibre)
        fast = time.process_time() - start
        start = time.process_time()
        kernel = layer.spatial(spatial)[:, :, None] * layer.fibre(fibre)[None] / O  # (E, O, O', C)
        full = torch.zeros(n, O, C).index_add_(0, edges[1], (kernel * x[edges[0]][:, :, None]).sum(1)) + layer.bias
        slow = time.process_time() - start
    print(slow / fast, kernel.numel() / (n * n * O * C + O * O * C))
    assert float((separable - full).abs().max() / full.abs().max()) <= 1e-4
    assert slow >= 5 * fast
    assert kernel.numel() >= 15 * (n * n * O * C + O * O * C)


def test_the_basis_and_the_cutoff():
    basis = KernelBasis(2, 4, 3, 3)
    seen = []
    basis.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    basis(torch.tensor([2.0, 3.0]))
    assert seen[0].tolist() == [2, 3, 4, 6, 6, 9, 8, 12, 12, 18, 12, 18, 18, 27]
    u = torch.linspace(0, 1.5, 301, dtype=torch.float64).requires_grad_()
    value = polynomial_cutoff(u)
    (slope,) = torch.autograd.grad(value.sum(), u)
    value = value.detach()
    assert value[0] == 1
    assert float(value[u.detach() >= 1].abs().max()) <= 1e-12
    assert (slope <= 1e-9).all()
    assert float(slope[200].abs()) <= 1e-9


def test_the_first_training_batch_sets_the_scales_once():
    net = network(8).train()
    x, pos, vec = X, POS, VEC
    net(x, pos, vec)
    first = [block.convolution.spatial.weight.clone() for block in net.blocks]
    net(2 * x, pos, vec)
    for before, block in zip(first, net.blocks, strict=True):
        assert torch.equal(before, block.convolution.spatial.weight)
        assert block.convolution.calibrated
    copy = network(8, seed=3).train()
    copy.load_state_dict(net.state_dict())
    copy(x, pos, vec)
    assert torch.equal(copy.blocks[0].convolution.spatial.weight, net.blocks[0].convolution.spatial.weight)


def test_forces_are_finite_at_self_loops():
    net = network(8, task="graph")
    pos = POS.clone().requires_grad_()
    (force,) = torch.autograd.grad(net(X, pos, VEC)[0].sum(), pos)
    assert torch.isfinite(force).all()
    assert float(force.norm()) > 0


# --- five charges ----------------------------------------------------------------------------------------------------


def charges(count, seed):
    """Five charges of ±1 each: charge, position, velocity at t = 0 and position at t = 1, by leapfrog."""
    g = generator(seed)
    q = torch.randint(0, 2, (count, 5, 1), generator=g).double() * 2 - 1
    x = torch.randn(count, 5, 3, dtype=torch.float64, generator=g)
    v = 0.5 * nn.functional.normalize(torch.randn(count, 5, 3, dtype=torch.float64, generator=g), dim=-1)
    start = x.clone(), v.clone()

    def acceleration(x):
        d = x[:, :, None] - x[:, None]
        cube = (d.square().sum(-1) + 0.01) ** 1.5
        return (q[:, :, None] * q[:, None] * d / cube[..., None]).sum(2)

    a = acceleration(x)
    for _ in range(500):
        v = v + 0.001 * a
        x = x + 0.002 * v
        a = acceleration(x)
        v = v + 0.001 * a
    return [t.float() for t in (q, *start, x)]


def train(model, data, held_out, epochs, lr):
    """Test error of a model of displacements, trained with random rotations."""
    q, x, v, end = data
    rng, g = np.random.default_rng(0), generator(5)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * 10)
    for _ in range(epochs):
        for part in torch.randperm(len(q), generator=g).split(len(q) // 10):
            R = torch.from_numpy(Rotation.random(rng=rng).as_matrix()).float()
            found = model(q[part], x[part] @ R, v[part] @ R)
            loss = (found - (end[part] - x[part]) @ R).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
    model.eval()
    q, x, v, end = held_out
    with torch.no_grad():
        return float((x + model(q, x, v) - end).square().mean())


class Charges(nn.Module):
    def __init__(self, num_ori):
        super().__init__()
        self.net = Ponita(2, 1 if num_ori else 0, 32, 0, 1, 3, num_ori, grid="icosahedron")

    def forward(self, q, x, v):
        speed = v.norm(dim=-1, keepdim=True)
        _, moved = self.net(torch.cat((q, speed), -1), x, v[:, :, None] if self.net.in_vector else None)
        return moved[:, :, 0] + (v if self.net.in_vector else 0)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(35, 160), nn.GELU(), nn.Linear(160, 160), nn.GELU(), nn.Linear(160, 15))

    def forward(self, q, x, v):
        return v + self.net(torch.cat((q, x, v), -1).flatten(1)).view_as(v)


def test_five_charges():
    data, held_out = charges(1000, 0), charges(500, 1)
    torch.manual_seed(0)
    errors = {
        "PONITA": train(Charges(12), data, held_out, 12, 5e-3),
        "PNITA": train(Charges(0), data, held_out, 24, 5e-3),
        "MLP": train(Plain(), data, held_out, 24, 5e-3),
        "constant velocity": float((held_out[1] + held_out[2] - held_out[3]).square().mean()),
    }
    print(errors)
    assert errors["PONITA"] <= 0.03
    assert errors["PONITA"] <= 0.4 * min(value for name, value in errors.items() if name != "PONITA")


# --- weights as clouds -----------------------------------------------------------------------------------------------


def check_report(report):
    assert report.column("predictor") == [
        "PONITA on the cloud", "PNITA on the cloud", "ridge on the cloud's moments", "kind of matrix alone",
        "seven spectral numbers",
    ]  # fmt: skip
    json.dumps(report.as_json(), allow_nan=False)
    assert "no recipe acts on this" in report.findings[1]


def test_the_report_prints_its_baselines_and_leaves_the_model_alone(tmp_path):
    folder = save_tiny(tmp_path / "model", num_hidden_layers=5)
    options = {"matrices": 30, "neurons": 16, "steps": 2, "hidden": 4, "tokens": 32}
    text = str(write_text(tmp_path / "letters.txt"))
    check_report(analyze_model(str(folder), "ponita", options, text, samples=2, length=16))
    with pytest.raises(InputError, match="the matrices lie in 3, fewer than 5"):
        analyze_model(str(save_tiny(tmp_path / "small")), "ponita", options, text, samples=2, length=16)


@pytest.mark.slow
def test_clouds_tell_less_than_the_kind_of_matrix(smollm2, smollm2_tokenizer, wikitext):
    from llmcompress.calibration.text import pack, tokenize

    tokens = pack(tokenize(smollm2_tokenizer, [wikitext["valid"][:4000]]), 1, 256, "valid")
    before = smollm2.model.layers[3].mlp.up_proj.weight.clone()
    subject = gather(smollm2, tokens, [r"layers\.0\.self_attn\.q_proj"])
    subject.model, subject.tokens = smollm2, tokens
    report = build_analysis("ponita", {}).analyze(subject)
    print(report.rows, report.findings)
    check_report(report)
    assert torch.equal(smollm2.model.layers[3].mlp.up_proj.weight, before)
    found = dict(zip(report.column("predictor"), report.column("R²"), strict=True))
    assert max(found["kind of matrix alone"], found["seven spectral numbers"]) > found["PONITA on the cloud"]
    assert "not useful here" in report.findings[0]


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_clouds(caplog):
    net = network(8)
    with pytest.raises(InputError, match="PNITA cannot take vectors"):
        Ponita(1, 1, 8, 1, 0, num_ori=0)
    with pytest.raises(InputError, match="radius must be positive; got 0"):
        Ponita(1, 0, 8, 1, 0, radius=0)
    with pytest.raises(InputError, match="positions must be 2-D or 3-D; got dim 4"):
        Ponita(1, 0, 8, 1, 0, dim=4)
    with pytest.raises(InputError, match="it needs num_ori = -1"):
        Ponita(1, 0, 8, 1, 0, universal=True)
    with pytest.raises(InputError, match="the dodecahedron has 20 vertices; got 12"):
        Ponita(1, 0, 8, 1, 0, num_ori=12, grid="dodecahedron")
    with pytest.raises(InputError, match="the icosahedron has 12 vertices; got 7"):
        orientation_grid(7, "icosahedron")
    with pytest.raises(InputError, match="one orientation at least; got 0"):
        orientation_grid(0)
    with pytest.raises(InputError, match=r"pos must be \(N, 3\) or \(B, n, 3\)"):
        net(X[0], POS[0, :, :2], VEC[0])
    with pytest.raises(InputError, match="x, pos or vec is not finite"):
        net(X, POS * math.nan, VEC)
    with pytest.raises(InputError, match=r"edge_index is out of range: nodes are 0\.\.5; got 6"):
        net(X[0], POS[0], VEC[0], edge_index=torch.tensor([[0, 6], [1, 2]]))
    with pytest.raises(InputError, match="an empty graph"):
        net(X[0, :0], POS[0, :0], VEC[0, :0])
    with pytest.raises(InputError, match="no graph empty"):
        net(X, POS, VEC, mask=torch.tensor([[True] * 6, [False] * 6]))
    with pytest.raises(InputError, match="takes 1 vectors a node"):
        net(X, POS)
    with pytest.raises(InputError, match="take a mask, not edge_index"):
        net(X, POS, VEC, edge_index=torch.zeros(2, 0, dtype=torch.int64))
    same = POS.clone()
    same[0, 1] = same[0, 0]
    with pytest.raises(InputError, match="a lifted edge of length zero has no orientation"):
        network(-1)(X, same, VEC)
    with pytest.raises(InputError, match=r"orientations must have unit length; one is off by 1"):
        pair_invariants(POS[0], 2 * unit(6, 3), POS[1], unit(6, 3))
    with pytest.raises(InputError, match="space 'r3s2' needs orientations"):
        pair_invariants(POS[0], None, POS[1], None)
    with pytest.raises(InputError, match="unknown space 'e3'"):
        pair_invariants(POS[0], None, POS[1], None, "e3")
    with caplog.at_level(logging.WARNING, "llmcompress"):
        network(8, radius=0.01)(X, POS, VEC)
    assert "radius 0.01 leaves 12 of 12 nodes with no neighbour but themselves" in caplog.text
