import numpy as np
import pytest

from isd_tf.evaluation import clusters
from isd_tf.evaluation.features import Features


def test_directions_are_found_whatever_the_lengths():
    """k-means sees unit rows: three directions, lengths from 0.01 to 100."""
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 40)
    directions = np.eye(3)[labels] + 0.05 * random.normal(size=(120, 3))
    values = (directions * 10 ** random.uniform(-2, 2, (120, 1))).astype(np.float32)
    found = clusters.cluster(Features(values, labels), 3, seed=0)
    assert found.scores == {"purity": 1.0, "nmi": pytest.approx(1), "ari": pytest.approx(1)}
    assert all(len(np.unique(found.assignments[labels == label])) == 1 for label in range(3))
    unlabelled = clusters.cluster(Features(values, np.full(120, -1)), 3, seed=0)
    assert unlabelled.scores == {}
    np.testing.assert_array_equal(unlabelled.assignments, found.assignments)


def entropy(counts):
    p = counts[counts > 0] / counts.sum()
    return -(p * np.log(p)).sum()


def test_scores_are_those_of_their_definitions():
    random = np.random.default_rng(1)
    labels, assignments = random.integers(0, 4, 60), random.integers(0, 3, 60)
    table = np.zeros((3, 4), int)
    np.add.at(table, (assignments, labels), 1)
    purity = sum(max(row) for row in table) / 60
    h_clusters, h_labels = entropy(table.sum(axis=1)), entropy(table.sum(axis=0))
    nmi = 2 * (h_clusters + h_labels - entropy(table.ravel())) / (h_clusters + h_labels)
    # Rand index over all pairs, corrected for chance.
    same = [
        (assignments[i] == assignments[j], labels[i] == labels[j])
        for i in range(60)
        for j in range(i)
    ]
    both, ours, theirs = (
        np.mean(x) for x in ([a and b for a, b in same], *zip(*same, strict=True))
    )
    ari = (both - ours * theirs) / ((ours + theirs) / 2 - ours * theirs)
    scores = clusters.score(assignments, labels)
    assert scores == pytest.approx({"purity": purity, "nmi": nmi, "ari": ari})


def test_members_are_random_and_of_their_clusters():
    assignments = np.array([0] * 5 + [1] * 20 + [2] * 20)
    drawn = clusters.draw_members(assignments, clusters=2, members=8, seed=0)
    assert len(drawn) == 2
    for rows in drawn:
        (cluster,) = np.unique(assignments[rows])
        assert len(set(rows)) == len(rows) == min(8, (assignments == cluster).sum())
    everything = clusters.draw_members(assignments, clusters=9, members=99, seed=0)
    assert sorted(np.concatenate(everything)) == list(range(45))
    other = clusters.draw_members(assignments, 2, 8, seed=1)
    assert [list(rows) for rows in other] != [list(rows) for rows in drawn]


@pytest.mark.parametrize("count", [0, 11])
def test_more_clusters_than_images_are_refused(count):
    features = Features(np.ones((10, 2), np.float32), np.zeros(10, int))
    with pytest.raises(ValueError, match=f"{count} clusters for 10 images"):
        clusters.cluster(features, count, seed=0)
