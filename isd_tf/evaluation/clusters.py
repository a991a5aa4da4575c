"""Clusters of features by k-means, and how well they match the labels."""

from typing import NamedTuple

import numpy as np
import sklearn.cluster
import sklearn.metrics

from isd_tf.evaluation.features import Features, unit_rows


class Clusters(NamedTuple):
    """A partition of N examples, and its scores where labels are known."""

    assignments: np.ndarray  # int [N], a cluster each
    scores: dict[str, float]  # purity, nmi, ari; empty without two classes to compare with


def cluster(features: Features, count: int, seed: int) -> Clusters:
    """Partitions L2-normalised features by k-means (scikit-learn's, k-means++, one start).

    Args:
        features: [N, C]; labels are used for the scores only.
        count: number of clusters; the paper has 1000 on ImageNet.
        seed: of the start.

    Raises:
        ValueError: when there are not as many examples.

    Source: paper figure 3.
    """
    total = len(features.labels)
    if not 1 <= count <= total:
        raise ValueError(
            f"k-means needs at least as many images as clusters. Received: {count} clusters for "
            f"{total} images."
        )
    kmeans = sklearn.cluster.KMeans(count, n_init=1, random_state=seed, copy_x=False)
    assignments = kmeans.fit_predict(unit_rows(features.values))
    known = features.labels.min() >= 0 and len(np.unique(features.labels)) > 1
    return Clusters(assignments, score(assignments, features.labels) if known else {})


def score(assignments: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compares clusters with labels, both integers [N].

    Returns:
        purity: share of the examples whose label is the commonest of their cluster, in [0, 1];
        nmi: normalised mutual information, arithmetic mean, in [0, 1];
        ari: adjusted Rand index, 1 for equal partitions, about 0 for unrelated ones.
    """
    table = sklearn.metrics.cluster.contingency_matrix(labels, assignments)
    return {
        "purity": float(table.max(axis=0).sum() / table.sum()),
        "nmi": float(sklearn.metrics.normalized_mutual_info_score(labels, assignments)),
        "ari": float(sklearn.metrics.adjusted_rand_score(labels, assignments)),
    }


def draw_members(
    assignments: np.ndarray, clusters: int, members: int, seed: int
) -> list[np.ndarray]:
    """Draws random examples of random clusters, as the paper's figure 3 shows them.

    Args:
        assignments: integers [N].
        clusters: how many clusters; fewer where there are not as many.
        members: of each; fewer where it has not as many.
        seed: of the draw.

    Returns:
        For each cluster its members' rows.
    """
    random = np.random.RandomState(seed)
    chosen = random.permutation(np.unique(assignments))[:clusters]
    return [random.permutation(np.flatnonzero(assignments == c))[:members] for c in chosen]
