import numpy as np
import pytest

from isd_tf.evaluation import votes
from isd_tf.evaluation.features import Features


def make(count, classes, seed):
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(0).normal(size=(classes, 5))
    values = (centres[labels] + random.normal(size=(count, 5))).astype(np.float32)
    return Features(values, 10 * labels)


def weighted_by_hand(bank, query, k, temperature):
    """Labels of one query, most votes first, and equal ones by number."""
    cosines = bank.values @ query / np.linalg.norm(bank.values, axis=1) / np.linalg.norm(query)
    votes_of = dict.fromkeys(sorted(set(bank.labels)), 0.0)
    for row in np.argsort(-cosines)[:k]:
        votes_of[bank.labels[row]] += np.exp(cosines[row] / temperature)
    return sorted(votes_of, key=lambda label: (-votes_of[label], label))


def test_weighted_votes_equal_those_counted_one_by_one(monkeypatch):
    monkeypatch.setattr(votes, "QUERY_BLOCK", 7)
    bank, queries = make(90, 9, 1), make(40, 9, 2)
    scores = votes.weighted_accuracy(bank, queries, (3, 20, 500), (0.07, 0.5))
    expected = {}
    for k in (3, 20):  # 500 are more than there are.
        for temperature in (0.07, 0.5):
            ranks = [
                weighted_by_hand(bank, query, k, temperature).index(label)
                for query, label in zip(queries.values, queries.labels, strict=True)
            ]
            for top in (1, 5):
                name = f"weighted_{k}nn_t{temperature}_top{top}"
                expected[name] = np.mean(np.array(ranks) < top)
    assert scores == pytest.approx(expected)
    assert len(set(expected.values())) > 4  # The settings matter.


def test_of_equal_votes_the_class_that_stands_first_wins():
    bank = Features(np.ones((2, 3), np.float32), np.array([7, 4]))
    queries = Features(np.ones((4, 3), np.float32), np.array([4, 4, 4, 7]))
    scores = votes.weighted_accuracy(bank, queries, (2,), (0.1,))
    assert scores == {"weighted_2nn_t0.1_top1": 0.75}


def test_among_five_classes_there_is_no_top_five():
    scores = votes.weighted_accuracy(make(40, 5, 1), make(10, 5, 2), (4,), (0.1,))
    assert list(scores) == ["weighted_4nn_t0.1_top1"]


def test_few_shots_are_drawn_anew_and_evenly(monkeypatch):
    bank, queries = make(60, 3, 1), make(30, 3, 2)
    drawn = []
    nearest = votes.nearest

    def remembering(queries, bank, k):
        drawn.append(bank)
        return nearest(queries, bank, k)

    monkeypatch.setattr(votes, "nearest", remembering)
    scores = votes.few_shot_accuracy(bank, queries, (1, 20, 21), draws=4, seed=3)
    assert list(scores) == [1, 20]  # No class has 21.
    assert [len(rows) for rows in drawn] == [3] * 4 + [60] * 4
    assert not np.array_equal(drawn[0], drawn[1])
    accuracies = []
    for few in drawn[:4]:  # A row of each class, in their order.
        cosines = few @ queries.values.T / np.linalg.norm(few, axis=1, keepdims=True)
        accuracies.append(np.mean(10 * np.argmax(cosines, 0) == queries.labels))
    assert scores[1] == pytest.approx((np.mean(accuracies), np.std(accuracies, ddof=1)))
    assert scores[20].std == pytest.approx(0, abs=1e-7)  # The whole bank each time.


def test_what_cannot_be_scored_is_said():
    bank, queries = make(9, 3, 1), make(6, 3, 2)
    with pytest.raises(ValueError, match="must have 20 rows of 5 numbers or more. Received: 9"):
        votes.weighted_accuracy(bank, queries)
    with pytest.raises(ValueError, match="needs 5 images. Received: 3 of the class 0"):
        votes.few_shot_accuracy(bank, queries, (5,))
    unknown = queries._replace(labels=np.full(6, -1))
    with pytest.raises(ValueError, match="label for every image of the queries"):
        votes.weighted_accuracy(bank, unknown)
    with pytest.raises(ValueError, match="none of 1 classes, the label 7"):
        votes.few_shot_accuracy(bank, queries._replace(labels=np.array([0, 10, 20, 7, 0, 0])))
