"""Nearest-neighbour scores as others report them, beside the paper's own in `knn.py`.

InstDisc, DINO and lightly weigh a neighbour's vote by its similarity; few-shot papers give a bank
of n images a class, drawn several times.
"""

from typing import NamedTuple

import numpy as np

from isd_tf.evaluation.features import Features, require_classes, require_labels
from isd_tf.evaluation.knn import nearest

# DINO's eval_knn.py has k = 10, 20, 100, 200 and T = 0.07; InstDisc's and lightly's are 200, 0.1.
NEIGHBORS = (20, 200)
TEMPERATURES = (0.07, 0.1)
SHOTS = (1, 5, 10)
DRAWS = 5
QUERY_BLOCK = 4096


def weighted_accuracy(
    bank: Features,
    queries: Features,
    neighbors: tuple[int, ...] = NEIGHBORS,
    temperatures: tuple[float, ...] = TEMPERATURES,
) -> dict[str, float]:
    """Share of the queries whose label gets most of the votes, each worth exp(cosine / T).

    Args:
        bank, queries: features and labels.
        neighbors: values of k; what is larger than the bank is left out.
        temperatures: values of T.

    Returns:
        Accuracies in [0, 1]: "weighted_20nn_t0.07_top1", ... and, of more than five classes, top5.

    Raises:
        ValueError: when labels are unknown, the bank is smaller than the smallest k, or lacks a
            query's class.

    Source: Wu et al., CVPR 2018 (InstDisc), section 3.4; facebookresearch/dino eval_knn.py.
    """
    _require_labels(bank, queries)
    fitting = [k for k in neighbors if k <= len(bank.labels)] or [min(neighbors)]
    rows, similarities = nearest(queries.values, bank.values, max(fitting))
    classes, places = np.unique(bank.labels, return_inverse=True)
    asked = np.searchsorted(classes, queries.labels)
    scores = {}
    for k in fitting:
        for temperature in temperatures:
            ranks = np.concatenate(
                [
                    _rank_of_label(
                        places[rows[part, :k]],
                        np.exp(similarities[part, :k] / temperature),
                        asked[part],
                        len(classes),
                    )
                    for part in _blocks(len(asked))
                ]
            )
            for top in (1, 5) if len(classes) > 5 else (1,):
                name = f"weighted_{k}nn_t{temperature:g}_top{top}"
                scores[name] = float(np.mean(ranks < top))
    return scores


class FewShot(NamedTuple):
    """1-NN accuracies in [0, 1] over draws of n bank images a class."""

    mean: float
    std: float  # of a sample


def few_shot_accuracy(
    bank: Features,
    queries: Features,
    shots: tuple[int, ...] = SHOTS,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[int, FewShot]:
    """1-NN accuracy where the bank has n random images of each class.

    Args:
        bank, queries: features and labels.
        shots: values of n; those of which a class has fewer images are left out.
        draws: how often each is drawn.
        seed: of the draws.

    Raises:
        ValueError: when labels are unknown, the bank lacks a query's class, or a class has fewer
            images than the smallest n.
    """
    _require_labels(bank, queries)
    classes, counts = np.unique(bank.labels, return_counts=True)
    fitting = [n for n in shots if n <= counts.min()]
    if not fitting:
        raise ValueError(
            f"Every class needs {min(shots)} images. Received: {counts.min()} of the class "
            f"{classes[np.argmin(counts)]}."
        )
    of_class = [np.flatnonzero(bank.labels == label) for label in classes]
    random = np.random.RandomState(seed)
    scores = {}
    for n in fitting:
        accuracies = []
        for _ in range(draws):
            drawn = np.concatenate([random.permutation(rows)[:n] for rows in of_class])
            rows, _ = nearest(queries.values, np.asarray(bank.values)[drawn], 1)
            accuracies.append(np.mean(bank.labels[drawn][rows[:, 0]] == queries.labels))
        scores[n] = FewShot(float(np.mean(accuracies)), float(np.std(accuracies, ddof=1)))
    return scores


def _require_labels(bank, queries):
    require_labels(bank.labels, "bank")
    require_labels(queries.labels, "queries")
    require_classes(queries.labels, bank.labels, "bank")


def _rank_of_label(places, weights, asked, classes):
    """How many classes [q] have more votes than the asked one, or as many and stand before it."""
    votes = np.zeros((len(asked), classes))
    np.add.at(votes, (np.arange(len(asked))[:, np.newaxis], places), weights)
    own = votes[np.arange(len(asked)), asked][:, np.newaxis]
    before = np.arange(classes) < asked[:, np.newaxis]
    return np.sum((votes > own) | ((votes == own) & before), axis=1)


def _blocks(count):
    return [slice(first, first + QUERY_BLOCK) for first in range(0, count, QUERY_BLOCK)]
