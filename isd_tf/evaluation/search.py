"""Finding in a collection's embeddings: nearest, nearly the same, unlike all others, diverse.

All take unit rows [N, D], in memory or mapped from a file, and compare by cosine. Nothing of N x N
is ever held.
"""

import numpy as np
import scipy.sparse.csgraph
import tensorflow as tf

from isd_tf.evaluation import knn

# Queries whose neighbours are searched in one pass over the bank.
QUERIES = 40 * knn.QUERY_BLOCK
# Rows compared with as many others at a time: their similarities take 16 MB.
BLOCK = 2048
# Two embeddings of one image differ by so much from a similarity of 1, in float32.
ROUNDING = 1e-6


def nearest(queries: np.ndarray, bank: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k rows of a bank that are most similar to each query, exactly.

    Args:
        queries: unit rows [Q, D].
        bank: unit rows [N, D].
        k: at most N is found.

    Returns:
        Rows of the bank, int64 [Q, k], nearest first, equal ones in the bank's order; and their
        similarities, float32 [Q, k].

    Raises:
        ValueError: for queries of another dimension.
    """
    _require_dimension(queries, bank)
    parts = [
        knn.nearest(queries[first : first + QUERIES], bank, min(k, len(bank)))
        for first in range(0, len(queries), QUERIES)
    ]
    rows, similarities = zip(*parts, strict=True)
    return np.concatenate(rows), np.concatenate(similarities)


def nearest_by_faiss(
    queries: np.ndarray, bank: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """`nearest` by faiss' exact index of inner products, which holds the whole bank in memory.

    Raises:
        ModuleNotFoundError: when faiss is not installed.
        ValueError: for queries of another dimension.
    """
    _require_dimension(queries, bank)
    try:
        import faiss
    except ImportError:
        raise ModuleNotFoundError(
            "The engine faiss is not installed. pip install faiss-cpu, or leave --engine out."
        ) from None
    index = faiss.IndexFlatIP(bank.shape[1])
    for begin in range(0, len(bank), knn.BANK_CHUNK):
        index.add(np.array(bank[begin : begin + knn.BANK_CHUNK]))
    similarities, rows = index.search(np.array(queries), min(k, len(bank)))
    return rows, similarities


ENGINES = {"exact": nearest, "faiss": nearest_by_faiss}


def _require_dimension(queries, bank):
    if bank.shape[1:] != queries.shape[1:]:
        raise ValueError(
            f"Queries must have the {bank.shape[1]} numbers of the embeddings that are searched. "
            f"Received: {queries.shape[1]}. Embed both by the same encoder."
        )


def nearest_to_rows(
    embeddings: np.ndarray, rows: np.ndarray, k: int, engine=nearest
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k nearest of some rows among all others of their own collection.

    Args:
        embeddings: unit rows [N, D].
        rows: int64 [Q].
        k: at most N - 1 are found.
        engine: of ENGINES' functions.

    Returns:
        As `nearest`, without the rows themselves.
    """
    found, similarities = engine(embeddings[rows], embeddings, k + 1)
    is_other = found != np.asarray(rows)[:, np.newaxis]
    # Where more than k others are the same, the row itself may not be among them.
    is_other &= np.cumsum(is_other, axis=1) < found.shape[1]
    shape = len(found), found.shape[1] - 1
    return found[is_other].reshape(shape), similarities[is_other].reshape(shape)


def near_duplicates(embeddings: np.ndarray, threshold: float) -> list[np.ndarray]:
    """Groups the rows that are nearly the same.

    Args:
        embeddings: unit rows [N, D].
        threshold: two rows at least as similar are in one group; so are two that others connect.

    Returns:
        Groups of two rows or more, each sorted, in the order of their first rows.
    """
    count = len(embeddings)
    group = np.arange(count)  # The first row of each row's group, as far as it is known.
    for first in range(0, count, BLOCK):
        rows = tf.constant(np.array(embeddings[first : first + BLOCK]))
        for second in range(first, count, BLOCK):
            others = tf.constant(np.array(embeddings[second : second + BLOCK]))
            i, j = _similar(rows, others, tf.constant(threshold - ROUNDING, tf.float32)).numpy().T
            a, b = group[first + i], group[second + j]
            a, b = a[a != b], b[a != b]
            if len(a):
                group = _joined(group, a, b)
    order = np.argsort(group, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    return [members for members in groups if len(members) > 1]


@tf.function(reduce_retracing=True)
def _similar(rows, others, threshold):
    return tf.where(tf.matmul(rows, others, transpose_b=True) >= threshold)


def _joined(group, a, b):
    """Joins groups, each known by its first row, in pairs."""
    count = len(group)
    links = scipy.sparse.coo_matrix((np.ones(len(a), bool), (a, b)), (count, count))
    _, component = scipy.sparse.csgraph.connected_components(links, directed=False)
    firsts = np.full(component.max() + 1, count)
    np.minimum.at(firsts, component[group], group)
    return firsts[component[group]]


def outliers(
    embeddings: np.ndarray, count: int, k: int, engine=nearest
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the rows least like those that are most like them.

    Args:
        embeddings: unit rows [N, D].
        count: how many to find.
        k: a row's score is its mean similarity to the k nearest others.
        engine: of ENGINES' functions.

    Returns:
        Rows, int64 [count], the lowest score first, and their scores, float32.

    Raises:
        ValueError: when there is nothing to compare with.
    """
    if len(embeddings) < 2:
        raise ValueError("Outliers need other images to be unlike. Received: one image.")
    scores = []
    for first in range(0, len(embeddings), QUERIES):
        rows = np.arange(len(embeddings))[first : first + QUERIES]
        scores.append(nearest_to_rows(embeddings, rows, k, engine)[1].mean(axis=1))
    scores = np.concatenate(scores)
    rows = np.argsort(scores, kind="stable")[:count]
    return rows, scores[rows]


def k_centres(embeddings: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Chooses rows that cover the collection: each is the one least like those before it.

    The first is the one most like the mean of all. Greedy k-centre: no choice of as many rows
    leaves the worst covered row at less than half its distance here.

    Args:
        embeddings: unit rows [N, D].
        count: at most N are chosen.

    Returns:
        Rows, int64 [count], in the order of choice, and each one's similarity to the most similar
        chosen before it, float32 (of the first: to the mean).

    Source: Gonzalez 1985, Clustering to minimize the maximum intercluster distance; as active
    learning Sener and Savarese 2018, Active learning for convolutional neural networks.
    """
    blocks = range(0, len(embeddings), knn.BANK_CHUNK)

    def similarities_to(vector):
        return np.concatenate([embeddings[i : i + knn.BANK_CHUNK] @ vector for i in blocks])

    total = sum(embeddings[i : i + knn.BANK_CHUNK].sum(axis=0, dtype=np.float64) for i in blocks)
    mean = (total / max(np.linalg.norm(total), 1e-12)).astype(np.float32)
    to_mean = similarities_to(mean)
    chosen, similarities = [int(np.argmax(to_mean))], [to_mean.max()]
    covered = similarities_to(embeddings[chosen[0]])  # By the most similar that is chosen.
    covered[chosen[0]] = np.inf
    while len(chosen) < min(count, len(embeddings)):
        row = int(np.argmin(covered))
        chosen.append(row)
        similarities.append(covered[row])
        covered = np.maximum(covered, similarities_to(embeddings[row]))
        covered[row] = np.inf  # Of two that are the same, neither is chosen again.
    return np.array(chosen), np.array(similarities, np.float32)
