"""Spectral clustering of embeddings, on a neighbour graph that is always connected.

Sources: Ng, Jordan and Weiss, On Spectral Clustering: Analysis and an Algorithm (2001); von Luxburg, A Tutorial on
Spectral Clustering (2007).
"""

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, eye_array
from scipy.sparse.csgraph import connected_components, laplacian, minimum_spanning_tree
from scipy.sparse.linalg import ArpackNoConvergence, eigsh
from sklearn.cluster import KMeans
from sklearn.metrics import pairwise_distances_argmin, pairwise_distances_argmin_min
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.neighbors import kneighbors_graph
from sklearn.utils import check_array, resample

from engine.kernels import Doubles

# Beyond them a sample is clustered. At worst (no structure, 512 dimensions, 100 clusters, one core) as many points take
# 20 s, twice as many 72 s.
MAX_POINTS = 10_000
NEIGHBOURS = 10  # scikit-learn's default

Clusters = npt.NDArray[np.int64]


def spectral_clusters(
    X: npt.ArrayLike, n_clusters: int, *, strata: npt.ArrayLike | None = None, random_state: int = 42
) -> Clusters:
    """The cluster of each row of X (N, D): (N,) int64 from 0 to n_clusters - 1, the same for the same random_state.

    The graph joins each point with its 10 nearest neighbours and the parts that this leaves apart with single edges
    (see `neighbour_graph`); k-means, best of ten starts, clusters the rows of the first n_clusters eigenvectors of its
    random-walk Laplacian I - D^-1 W, which are not scaled to unit length (von Luxburg's section 4, after Shi and Malik;
    Ng, Jordan and Weiss scale them; scikit-learn does not). Equal rows share a cluster and count as one point.

    Of more than MAX_POINTS rows, that many are drawn with random_state and clustered, from each of the strata (N,) in
    its share where those are given; the others join the cluster with the nearest mean.

    Raises ValueError where X is not a finite (N, D) array, and for fewer than one cluster or more clusters than
    distinct points.
    """
    rows = check_array(X, dtype=[np.float32, np.float64])
    if len(rows) <= MAX_POINTS:
        return _cluster(rows, n_clusters, random_state)
    drawn = resample(
        np.arange(len(rows)), replace=False, n_samples=MAX_POINTS, stratify=strata, random_state=random_state
    )
    of_drawn = _cluster(rows[drawn], n_clusters, random_state)
    clusters: Clusters = pairwise_distances_argmin(rows, cluster_means(rows[drawn], of_drawn)).astype(np.int64)
    clusters[drawn] = of_drawn
    return clusters


def cluster_means(X: npt.NDArray[np.floating], clusters: npt.NDArray[np.integer]) -> Doubles:
    """The mean of the rows of X (N, D) in each of the clusters (N,), which are 0 .. K - 1: (K, D) float64."""
    return np.stack([X[clusters == k].mean(axis=0, dtype=np.float64) for k in range(clusters.max() + 1)])


def neighbour_graph(X: npt.NDArray[np.floating]) -> csr_array:
    """The symmetric, connected neighbour graph of the distinct rows of X (N, D), N > 1: (N, N) float64 weights.

    A pair weighs 1 where each is among the other's NEIGHBOURS nearest points, 1/2 where one of them is. Of a graph in
    several components, the indicator of each is a null vector of the Laplacian, and with more components than
    clusters nothing tells which to put together. So the components are joined along the minimum spanning tree of
    their means, each time by one edge between the two nearest points, which weighs 1 / (1 + its length / the median
    length of these edges). So light are they that components stay clusters where there are enough clusters, and the
    nearest are put together where there are not; that no weight is far from the others keeps the eigenvalues apart.
    """
    nearest = csr_array(kneighbors_graph(X, min(NEIGHBOURS, len(X) - 1)))
    graph = (nearest + nearest.T) / 2
    count, component = connected_components(graph, directed=False)
    if count == 1:
        return graph
    # The 1 changes no tree, but without it two components with one mean would be taken for unconnected.
    tree = minimum_spanning_tree(1 + euclidean_distances(cluster_means(X, component)))
    pairs = [_nearest_pair(X, component, i, j) for i, j in zip(*tree.nonzero(), strict=True)]
    first, second, lengths = (np.array(column) for column in zip(*pairs, strict=True))
    edges = csr_array((1 / (1 + lengths / np.median(lengths)), (first, second)), shape=graph.shape)
    return graph + edges + edges.T


def _nearest_pair(
    X: npt.NDArray[np.floating], component: npt.NDArray[np.integer], first: int, second: int
) -> tuple[int, int, float]:
    ours, theirs = np.flatnonzero(component == first), np.flatnonzero(component == second)
    nearest, distances = pairwise_distances_argmin_min(X[ours], X[theirs])
    closest = distances.argmin()
    return ours[closest], theirs[nearest[closest]], distances[closest]


def _cluster(rows: npt.NDArray[np.floating], n_clusters: int, random_state: int) -> Clusters:
    points, point_of_row = np.unique(rows, axis=0, return_inverse=True)
    if n_clusters < 1:
        raise ValueError(f"n_clusters must be at least 1, not {n_clusters}")
    if n_clusters > len(points):
        raise ValueError(f"{n_clusters} clusters need at least as many distinct points, there are {len(points)}")
    if n_clusters in (1, len(points)):
        of_point = np.arange(len(points)) % n_clusters
    else:
        embedding = _spectral_embedding(neighbour_graph(points), n_clusters, random_state)
        of_point = KMeans(n_clusters, n_init=10, random_state=random_state).fit_predict(embedding)
        of_point = np.unique(of_point, return_inverse=True)[1]  # k-means may leave a cluster empty
    clusters: Clusters = of_point.astype(np.int64)[point_of_row.reshape(-1)]  # NumPy 2.0 alone gives it a second axis
    return clusters


def _spectral_embedding(graph: csr_array, dimensions: int, random_state: int) -> Doubles:
    """The eigenvectors of the smallest eigenvalues of I - D^-1 W of the (N, N) graph, as columns: (N, dimensions)."""
    normalised, root_degrees = laplacian(graph, normed=True, return_diag=True)
    start = np.random.default_rng(random_state).uniform(-1, 1, graph.shape[0])
    # The smallest eigenvalues of L are the largest of I - L, which needs products only. scikit-learn's "arpack" inverts
    # L, and neighbour graphs of many dimensions fill its factors: 10,000 points of noise took more than 100 s in place
    # of 1 s; "lobpcg" takes twice as long as this and warns where eigenvalues lie close together, as light edges do.
    try:
        _, vectors = eigsh(eye_array(graph.shape[0]) - normalised, k=dimensions, which="LA", v0=start)
    except ArpackNoConvergence as error:
        raise ValueError(
            f"the neighbour graph's eigenvectors were not found: {error}; ask for fewer clusters"
        ) from error
    embedding: Doubles = vectors / root_degrees[:, np.newaxis]
    return embedding
