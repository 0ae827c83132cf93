"""Spectral clustering: clusters that are there are found, whatever the graph looks like, and always the same ones."""

import numpy as np
import numpy.typing as npt
import pytest
from scipy.sparse.csgraph import connected_components, laplacian
from sklearn.cluster import SpectralClustering
from sklearn.datasets import make_blobs, make_circles
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import kneighbors_graph
from threadpoolctl import threadpool_limits

from probes import spectral
from probes.spectral import cluster_means, neighbour_graph, spectral_clusters

pytestmark = pytest.mark.filterwarnings("error")


def blobs(rows: int, centres: int, spread: float = 0.1, seed: int = 0) -> tuple[npt.NDArray, npt.NDArray]:
    X, y = make_blobs(rows, 8, centers=centres, cluster_std=spread, random_state=seed)
    return X.astype(np.float32), y


@pytest.mark.parametrize("centres", [1, 2, 5, 12])
def test_blobs_that_are_components_are_the_clusters(centres: int) -> None:
    X, y = blobs(40 * centres, centres)
    assert connected_components(kneighbors_graph(X, spectral.NEIGHBOURS))[0] >= centres
    clusters = spectral_clusters(X, centres)
    assert clusters.dtype == np.int64
    assert clusters.shape == y.shape
    assert adjusted_rand_score(y, clusters) == 1


def test_circles_within_circles_have_one_mean_and_are_still_told_apart() -> None:
    X, y = make_circles(400, factor=0.4, random_state=0)
    assert adjusted_rand_score(y, spectral_clusters(X, 2)) == 1


@pytest.mark.parametrize("seed", range(4))
def test_of_more_components_than_clusters_the_near_ones_are_put_together(seed: int) -> None:
    random = np.random.default_rng(seed)
    y = random.integers(0, 12, 600)
    pairs = 10 * random.normal(size=(6, 32))
    means = pairs[np.arange(12) // 2] + random.normal(size=(12, 32))
    X = means[y] + 0.05 * random.normal(size=(600, 32))
    assert connected_components(kneighbors_graph(X, spectral.NEIGHBOURS))[0] == 12
    assert adjusted_rand_score(y // 2, spectral_clusters(X, 6)) == 1


def test_on_a_connected_graph_the_clusters_are_scikit_learns() -> None:
    X, _ = blobs(600, 4, spread=4.0)
    graph = neighbour_graph(X)
    assert connected_components(kneighbors_graph(X, spectral.NEIGHBOURS))[0] == 1
    reference = SpectralClustering(4, affinity="precomputed", eigen_solver="lobpcg", eigen_tol=1e-8, random_state=42)
    assert adjusted_rand_score(reference.fit(graph).labels_, spectral_clusters(X, 4)) > 0.99


def test_the_graph_is_symmetric_connected_and_made_of_nearest_neighbours() -> None:
    X, y = blobs(200, 4)
    graph = neighbour_graph(X).toarray()
    nearest = kneighbors_graph(X, spectral.NEIGHBOURS).toarray()
    np.testing.assert_array_equal(graph, graph.T)
    assert connected_components(graph)[0] == 1
    bridges = (graph > 0) & (nearest + nearest.T == 0)
    np.testing.assert_array_equal(graph[~bridges], (nearest + nearest.T)[~bridges] / 2)
    # Three edges join four blobs; the longer, the lighter.
    first, second = np.nonzero(np.triu(bridges))
    assert (len(first), (y[first] != y[second]).all()) == (3, True)
    lengths = np.linalg.norm(X[first] - X[second], axis=1)
    np.testing.assert_allclose(graph[first, second], 1 / (1 + lengths / np.median(lengths)), rtol=1e-5)
    for i, j in zip(first, second, strict=True):
        between = np.linalg.norm(X[y == y[i]][:, None] - X[y == y[j]][None], axis=2)
        assert np.linalg.norm(X[i] - X[j]) == pytest.approx(between.min(), rel=1e-5)


def test_the_embedding_is_made_of_eigenvectors_of_the_random_walk_laplacian() -> None:
    graph = neighbour_graph(blobs(300, 3)[0])
    embedding = spectral._spectral_embedding(graph, 5, random_state=0)
    degrees = np.asarray(graph.sum(axis=1)).ravel() - graph.diagonal()
    walk = np.asarray(laplacian(graph).todense()) / degrees[:, None]
    smallest = np.sort(np.linalg.eigvals(walk).real)[:5]
    values = np.sum(embedding * degrees[:, None] * (walk @ embedding), axis=0) / np.sum(
        embedding**2 * degrees[:, None], axis=0
    )
    np.testing.assert_allclose(np.sort(values), smallest, atol=1e-9)
    np.testing.assert_allclose(walk @ embedding, embedding * values, atol=1e-9)


def test_the_same_seed_gives_the_same_clusters_on_any_number_of_threads() -> None:
    X, _ = blobs(500, 6, spread=4.0)
    expected = spectral_clusters(X, 6)
    for threads in (1, 2):
        with threadpool_limits(threads):
            np.testing.assert_array_equal(spectral_clusters(X, 6), expected)


def test_equal_rows_share_a_cluster() -> None:
    X, y = blobs(60, 3)
    repeated = np.random.default_rng(0).permutation(np.repeat(np.arange(60), 30))
    clusters = spectral_clusters(X[repeated], 3)
    assert adjusted_rand_score(y[repeated], clusters) == 1
    assert all(len(set(clusters[repeated == row])) == 1 for row in range(60))


@pytest.mark.parametrize(("rows", "n_clusters"), [(1, 1), (2, 1), (2, 2), (3, 2), (12, 11), (12, 12)])
def test_few_points(rows: int, n_clusters: int) -> None:
    clusters = spectral_clusters(np.random.default_rng(0).normal(size=(rows, 4)), n_clusters)
    assert set(clusters) <= set(range(n_clusters))
    assert n_clusters not in (1, rows) or len(set(clusters)) == n_clusters


def test_of_too_many_points_a_stratified_sample_is_clustered(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = blobs(900, 3, spread=0.5)
    y[y == 2] = np.where(np.arange((y == 2).sum()) < 5, 2, 1)
    rare = y == 2  # five rows
    monkeypatch.setattr(spectral, "MAX_POINTS", 180)
    seen: list[npt.NDArray] = []
    cluster = spectral._cluster
    monkeypatch.setattr(spectral, "_cluster", lambda rows, *rest: seen.append(rows) or cluster(rows, *rest))
    clusters = spectral_clusters(X, 3, strata=y, random_state=1)
    drawn = (X[:, None] == seen[0][None]).all(axis=2).any(axis=1)
    assert (len(seen[0]), drawn.sum(), (drawn & rare).sum()) == (180, 180, 1)
    assert adjusted_rand_score(make_blobs(900, 8, centers=3, random_state=0)[1], clusters) == 1
    np.testing.assert_array_equal(clusters, spectral_clusters(X, 3, strata=y, random_state=1))
    np.testing.assert_array_equal(seen[0], seen[1])
    spectral_clusters(X, 3, random_state=2)
    assert not np.array_equal(seen[0], seen[2])


def test_cluster_means() -> None:
    X, y = blobs(50, 3)
    means = cluster_means(X, y)
    assert means.dtype == np.float64
    np.testing.assert_allclose(means, [X[y == k].astype(np.float64).mean(axis=0) for k in range(3)], rtol=1e-12)


@pytest.mark.parametrize(
    ("X", "n_clusters", "message"),
    [
        (np.eye(5), 6, "6 clusters need at least as many distinct points, there are 5"),
        (np.ones((5, 2)), 2, "2 clusters need at least as many distinct points, there are 1"),
        (np.eye(5), 0, "n_clusters must be at least 1, not 0"),
        (np.full((5, 2), np.nan), 2, "contains NaN"),
        (np.ones(5), 2, "Expected 2D array"),
    ],
)
def test_points_that_cannot_be_clustered_are_refused(X: npt.NDArray, n_clusters: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spectral_clusters(X, n_clusters)
