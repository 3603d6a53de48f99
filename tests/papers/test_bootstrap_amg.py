"""Bootstrap AMG: exact algebra, spectra, block models with attributes, linear cost, and groups of a model's heads."""

import time

import networkx as nx
import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import sparse
from sklearn.metrics import normalized_mutual_info_score

from llmcompress.backends.graphs.amg import iterate
from llmcompress.backends.graphs.bootstrap_amg import (
    BootstrapAMG,
    BootstrapAMGClustering,
    BootstrapAMGOptions,
    augment_graph,
    bootstrap,
    build_hierarchy,
    compatible_weights,
    entropy,
    head_affinity_graph,
    modularity,
    neighbour_graph,
    pairwise_prolongator,
    spd_laplacian,
)
from llmcompress.backends.graphs.subspaces import affinities, shared_basis_error, sketch
from llmcompress.errors import InputError
from tests.tiny import tiny_model


def block_model(n, q, c, ratio, m, right, seed):
    """A: q blocks, mean degree c, c_out / c_in = ratio, components joined by an edge; m attributes (n, m); truth."""
    generator = np.random.default_rng(seed)
    truth = np.arange(n) % q
    inside = c * q / (1 + (q - 1) * ratio) / n
    p = np.where(truth[:, None] == truth, inside, ratio * inside)
    upper = np.triu(generator.random((n, n)) < p, 1)
    A = (upper | upper.T).astype(float)
    labels = sparse.csgraph.connected_components(sparse.csr_matrix(A), directed=False)[1]
    for label in range(1, labels.max() + 1):
        i, j = (generator.choice(np.flatnonzero(labels == part)) for part in (label - 1, label))
        A[i, j] = A[j, i] = 1
    known = generator.random((n, m)) < right
    return A, np.where(known, truth[:, None], generator.integers(0, q, (n, m))), truth


@pytest.fixture(scope="module")
def ambiguous():
    A, attributes, _ = block_model(400, 5, 5, 0.3, 2, 0.7, 0)
    return A, attributes, augment_graph(A, attributes)


# --- the algebra -----------------------------------------------------------------------------------------------------


def test_the_augmented_graph_has_a_vertex_a_value(ambiguous):
    A, attributes, (grown, index) = ambiguous
    assert grown.shape == (410, 410)
    assert (grown.nnz - sparse.csr_matrix(A).nnz) // 2 == 800
    assert index.shape == (400, 2)
    for t in range(2):
        for i in (0, 17, 399):
            assert grown[i, index[i, t]] == 1
            assert (index[:, t] == index[i, t]).sum() == (attributes[:, t] == attributes[i, t]).sum()


def test_the_laplacian_is_positive_definite(ambiguous):
    L = spd_laplacian(ambiguous[2][0])
    least = float(scipy.linalg.eigvalsh(L.toarray())[0])
    print(f"least eigenvalue {least:.2e}")
    assert least > 1e-3
    assert (L.data != 0).all()


def test_the_prolongator_is_orthonormal_and_holds_the_vector(ambiguous):
    L = spd_laplacian(ambiguous[2][0])
    for w in (np.ones(410), np.random.default_rng(0).standard_normal(410)):
        P = pairwise_prolongator(L, w)
        assert abs((P.T @ P).toarray() - np.eye(P.shape[1])).max() <= 1e-12
        assert abs(P @ (P.T @ w) - w).max() <= 1e-12 * abs(w).max()
        assert np.diff(P.tocsc().indptr).max() <= 2


def test_the_matching_has_at_least_half_the_largest_weight(ambiguous):
    L = spd_laplacian(ambiguous[2][0])
    weights = compatible_weights(L, np.ones(410))
    assert (weights.data > 0).all()
    graph = nx.Graph()
    graph.add_weighted_edges_from(zip(weights.row.tolist(), weights.col.tolist(), weights.data.tolist(), strict=True))
    best = sum(graph[i][j]["weight"] for i, j in nx.max_weight_matching(graph))
    P = pairwise_prolongator(L, np.ones(410)).tocsc()
    pairs = [P.indices[a:b] for a, b in zip(P.indptr, P.indptr[1:], strict=False) if b - a == 2]
    own = sum(graph[int(i)][int(j)]["weight"] for i, j in pairs)
    assert best / 2 <= own <= best + 1e-9


def test_compatible_weights_follow_the_formula():
    L = spd_laplacian(np.array([[0, 2, 0], [2, 0, 1], [0, 1, 0]]))
    w = np.array([1.0, -2.0, 0.5])
    dense, found = L.toarray(), compatible_weights(L, w)
    a = {}
    for i, j in ((0, 1), (1, 2)):
        a[i, j] = 1 - 2 * w[i] * w[j] * dense[i, j] / (dense[i, i] * w[i] ** 2 + dense[j, j] * w[j] ** 2)
    least = min(map(abs, a.values()))
    for i, j, value in zip(found.row, found.col, found.data, strict=True):
        assert value == pytest.approx(np.log(abs(a[i, j]) / (0.999 * least)), rel=1e-12)


def test_modularity_and_entropy_agree_with_independent_ones(ambiguous):
    A, attributes, _ = ambiguous
    labels = np.random.default_rng(3).integers(0, 5, 400)
    clusters = [set(np.flatnonzero(labels == k).tolist()) for k in range(5)]
    expected = nx.algorithms.community.modularity(nx.from_numpy_array(A), clusters)
    assert modularity(sparse.csr_matrix(A), labels) == pytest.approx(expected, abs=1e-12)
    total = 0.0
    for k in range(5):
        for t in range(2):
            counts = np.bincount(attributes[labels == k, t])
            total += (labels == k).mean() * scipy.stats.entropy(counts, base=2)
    assert entropy(labels, attributes) == pytest.approx(total, rel=1e-12)


# --- the bootstrap ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(ambiguous):
    return bootstrap(spd_laplacian(ambiguous[2][0]))


def test_the_composite_reduces_what_one_hierarchy_cannot(ambiguous, found):
    print([f"{rate:.1e}" for rate in found.rates])
    assert found.rates[-1] <= 1e-6
    assert len(found.rates) <= 20
    L, x = spd_laplacian(ambiguous[2][0]), np.random.default_rng(5).standard_normal(410)
    for _ in range(15 * len(found.hierarchies)):
        before = x.copy()
        found.hierarchies[0].cycle(x, np.zeros(410))
        x, before = x / np.sqrt(before @ (L @ before)), before / np.sqrt(before @ (L @ before))
    alone = np.sqrt(x @ (L @ x)) ** len(found.hierarchies)
    print(f"composite {found.rates[-1]:.1e}, one hierarchy {alone:.1e}")
    assert found.rates[-1] <= 0.3 * alone


def test_the_smooth_vectors_hold_the_lowest_eigenvectors(ambiguous, found):
    L = spd_laplacian(ambiguous[2][0]).toarray()
    D = np.diag(L)
    lowest = scipy.linalg.eigh(L, np.diag(D))[1][:, :4]

    def held(W):
        Q = np.linalg.qr(np.sqrt(D)[:, None] * W)[0]
        return np.square(Q.T @ (np.sqrt(D)[:, None] * lowest)).sum(0)

    shares = held(found.smooth_vectors)
    noise = held(np.random.default_rng(1).standard_normal(found.smooth_vectors.shape))
    print(shares, noise)
    assert shares.min() >= 0.75
    assert shares.mean() >= 0.85
    assert noise.max() <= 0.2


def test_it_is_a_symmetric_preconditioner(ambiguous, found):
    M = found.as_linear_operator()
    L = spd_laplacian(ambiguous[2][0])
    dense = np.stack([M @ e for e in np.eye(410)[:40]])
    assert abs(dense[:, :40] - dense[:, :40].T).max() <= 1e-10 * abs(dense).max()
    steps = []
    sparse.linalg.cg(L, np.random.default_rng(2).standard_normal(410), M=M, rtol=1e-10, callback=steps.append)
    assert len(steps) <= 3


def test_composites_are_what_their_names_say(ambiguous, found):
    x, three = np.random.default_rng(7).standard_normal(410), found.hierarchies[:3]
    alone = [iterate([hierarchy], x, "multiplicative") for hierarchy in three]
    np.testing.assert_allclose(iterate(three, x, "additive"), np.mean(alone, 0), rtol=1e-12)
    there = iterate(three, x, "multiplicative")
    np.testing.assert_allclose(iterate(three[1:], alone[0], "multiplicative"), there, rtol=1e-12)
    np.testing.assert_allclose(iterate(three, x, "symmetrised"), iterate(three[::-1], there, "multiplicative"))
    L = spd_laplacian(ambiguous[2][0])
    both = [bootstrap(L, max_components=4, composite=name).rates for name in ("symmetrised", "multiplicative")]
    assert both[0][-1] < both[1][-1] < both[1][0] < 1


# --- block models ----------------------------------------------------------------------------------------------------


def agreement(ratio, attributed, **options):
    total = 0.0
    for seed in range(4):
        A, attributes, truth = block_model(300, 4, 8, ratio, 2, 0.6, seed)
        method = BootstrapAMGClustering(4, n_init=40, max_components=12, random_state=seed, **options)
        labels = method.fit_predict(A, attributes=attributes if attributed else None)
        assert len(np.unique(labels)) == 4
        total += normalized_mutual_info_score(truth, labels) / 4
    return total


def test_attributes_help_where_the_structure_is_ambiguous():
    clear = agreement(0.1, False)
    block, vertex = agreement(0.1, True), agreement(0.1, True, distance="vertex")
    print(f"0.1: structure {clear:.3f}, block {block:.3f}, vertex {vertex:.3f}")
    assert clear >= 0.75
    assert block < clear < vertex + 0.1  # where the structure is clear the block distance loses
    for ratio, least, gain in ((0.3, 0.30, 0.15), (0.5, 0.25, 0.2)):
        block, alone = agreement(ratio, True), agreement(ratio, False)
        print(f"{ratio}: structure {alone:.3f}, block {block:.3f}")
        assert block >= least
        assert block >= alone + gain


def test_labels_come_back_as_the_graph_did_and_repeat():
    A, attributes, _ = block_model(60, 3, 8, 0.1, 1, 0.8, 0)
    method = BootstrapAMGClustering(3, n_init=10, max_components=6, random_state=1)
    labels = method.fit_predict(A, attributes=attributes)
    assert labels.dtype == np.int64
    again = method.fit_predict(torch.tensor(A), attributes=torch.tensor(attributes))
    assert isinstance(again, torch.Tensor)
    assert torch.equal(again, torch.tensor(labels))
    assert np.array_equal(method.fit_predict(sparse.coo_matrix(A), attributes=attributes), labels)
    assert 0 < method.modularity_ < 1
    assert method.entropy_ < entropy(np.zeros(60, dtype=int), attributes)
    assert BootstrapAMGClustering(3).get_params()["distance"] == "block"
    assert method.fit(A).entropy_ is None


# --- cost ------------------------------------------------------------------------------------------------------------


def test_setup_is_linear():
    spent = []
    for n in (500, 1000, 2000, 4000):
        generator = np.random.default_rng(n)
        i, j = generator.integers(0, n, (2, 4 * n))
        ring = np.arange(n)
        rows, columns = np.concatenate((i, ring)), np.concatenate((j, (ring + 1) % n))
        keep = rows != columns
        A = sparse.coo_matrix((np.ones(keep.sum()), (rows[keep], columns[keep])), shape=(n, n)).tocsr()
        A = ((A + A.T) > 0).astype(float)
        L = spd_laplacian(A)
        times = []
        for _ in range(7):
            start = time.process_time()
            hierarchy = build_hierarchy(L, np.ones(n))
            times.append(time.process_time() - start)
        spent.append(min(times) / L.nnz)
        print(n, hierarchy.grid_complexity, hierarchy.operator_complexity, f"{1e6 * spent[-1]:.2f} µs a non-zero")
        assert hierarchy.grid_complexity <= 1.45
        assert hierarchy.operator_complexity <= 2.5
    assert spent[-1] <= 2 * spent[0]


# --- a model's heads -------------------------------------------------------------------------------------------------


def test_affinities_are_those_of_projections():
    weights = torch.randn(5, 6, 9, generator=torch.Generator().manual_seed(0))
    found = affinities(torch.stack([sketch(weight, 4) for weight in weights]))
    for i in range(5):
        for j in range(5):
            p, q = (torch.linalg.svd(weights[k].double())[2][:4] for k in (i, j))
            assert float(found[i, j]) == pytest.approx(float(torch.trace(p.T @ p @ q.T @ q)) / 4, rel=1e-9)


def test_the_shared_basis_error_is_that_of_the_stacked_weights():
    weights = torch.randn(6, 4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    lost = 0.0
    for k in range(3):
        rows = weights[labels == k].flatten(0, 1).numpy()
        u, s, vh = np.linalg.svd(rows, full_matrices=False)
        lost += np.square(rows - (u[:, :3] * s[:3]) @ vh[:3]).sum()
    assert shared_basis_error(weights, labels, 3) == pytest.approx(float(np.sqrt(lost / weights.square().sum())))


def test_a_models_heads_form_a_connected_graph():
    model = tiny_model("llama")
    A, attributes, names = head_affinity_graph(model, rank=4, n_neighbors=2)
    assert A.shape == (12, 12)
    assert names[5] == "model.layers.1.self_attn.q_proj[1]"
    assert attributes.shape == (12, 2)
    assert attributes[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert nx.is_connected(nx.from_scipy_sparse_array(A))
    with pytest.raises(InputError, match="no block has a map 'w_q'"):
        head_affinity_graph(model, "w_q")


def test_few_neighbours_are_raised_until_the_graph_is_connected():
    affinity = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)) + 1e-3
    A = neighbour_graph(affinity, 2)
    assert nx.is_connected(nx.from_scipy_sparse_array(A))


def test_groups_of_planted_subspaces_are_found():
    """Twelve weights that read three planes: the port's labels are those of the planes."""
    generator = torch.Generator().manual_seed(2)
    planes = [torch.linalg.qr(torch.randn(30, 4, generator=generator))[0] for _ in range(3)]
    weights = [torch.randn(8, 4, generator=generator) @ planes[i % 3].T for i in range(12)]
    backend = BootstrapAMG(BootstrapAMGOptions(rank=4, neighbors=2, attributes=[]))
    labels = backend.groups(torch.stack([backend.describe(w) for w in weights]), 3, torch.Generator().manual_seed(0))
    assert len({tuple(labels[i::3].tolist()) for i in range(3)}) == 3
    assert all(len(set(labels[i::3].tolist())) == 1 for i in range(3))


# --- bad input -------------------------------------------------------------------------------------------------------

RING = np.roll(np.eye(6), 1, 1) + np.roll(np.eye(6), -1, 1)


def changed(i, j, value, symmetric=True):
    A = RING.copy()
    A[i, j] = value
    if symmetric:
        A[j, i] = value
    return A


@pytest.mark.parametrize(
    ("A", "message"),
    [
        (RING[:5], "must be square"),
        (changed(0, 1, 2.0, symmetric=False), "must be symmetric"),
        (changed(0, 1, -1.0), "negative"),
        (changed(2, 2, 1.0), "self-loops"),
        (changed(0, 1, np.nan), "not finite"),
        (np.kron(np.eye(2), RING), r"must be connected; it has 2 components, of sizes 6, 6"),
        (np.array([[0.0, 1.0], [1.0, 0.0]]), "at least 3 vertices"),
    ],
)
def test_bad_graphs(A, message):
    with pytest.raises(InputError, match=message):
        BootstrapAMGClustering(2).fit(A)


@pytest.mark.parametrize("k", [1, 7])
def test_bad_numbers_of_clusters(k):
    with pytest.raises(InputError, match="n_clusters must be between 2 and the 6 vertices"):
        BootstrapAMGClustering(k).fit(RING)


def test_bad_attributes():
    with pytest.raises(InputError, match=r"attributes must be \(6, m\)"):
        BootstrapAMGClustering(2).fit(RING, attributes=np.zeros(5, dtype=int))
    with pytest.raises(InputError, match="attributes have NaN"):
        BootstrapAMGClustering(2).fit(RING, attributes=np.full((6, 1), np.nan))


def test_bad_options():
    L = spd_laplacian(RING)
    with pytest.raises(InputError, match="unknown composite 'both'"):
        bootstrap(L, composite="both")
    with pytest.raises(InputError, match="tol must be positive"):
        bootstrap(L, tol=0)
    with pytest.raises(InputError, match="unknown distance"):
        BootstrapAMGClustering(2, distance="edge").fit(RING)
