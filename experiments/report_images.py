"""What the student of a run sees in images: the sections of report.html that show pictures.

Of large datasets it looks at a part: every caption says at how many.
"""

import contextlib
import functools
from typing import NamedTuple

import evaluations
import numpy as np
import run_data
import sklearn.decomposition
import sklearn.manifold
from absl import logging
from evaluations import Run
from PIL import ImageOps
from program import sentence
from settings import FLAGS

from isd_tf.data import originals, subsets
from isd_tf.data.batches import numbered_views
from isd_tf.data.datasets import Dataset, RecordDataset
from isd_tf.data.decoding import Unreadable
from isd_tf.data.folders import shown
from isd_tf.data.pixels import UnreadableImage
from isd_tf.evaluation import clusters, confusion, features, knn, search
from isd_tf.report import pages, tensorboard
from isd_tf.report.pages import Dot, Picture, Row, Section, Table
from isd_tf.views import augment, photometric

# Images that are looked at: asked, and searched for their neighbours.
ASKED, SEARCHED = 2000, 20_000
# Pictures: images with their views; queries of a kind, and neighbours; clusters, and members.
SHOWN_VIEWS, QUERIES, NEIGHBORS, CLUSTERS, MEMBERS = 6, 6, 7, 8, 9
# Of the map: images, and the side of each one's picture.
MAPPED, TILE = 600, 40
# Classes of which the whole confusion is shown; of more, the pairs most often confused.
LARGEST_CONFUSION, CONFUSED_PAIRS = 24, 30
# Two images look the same that differ, made small, by so much of 255 (root mean square). Another
# JPEG of the same photograph differs by 1 to 3.
COMPARED_SIDE, SAME_LOOK = 32, 6.0
SAME_FEATURES = 1e-6  # Spread of unit rows up to which they are all the same.
SIMILAR = 0.9  # Cosine from which images are compared.


class Sample(NamedTuple):
    """Images of a dataset, and what the student makes of them."""

    name: str  # of the whole dataset
    dataset: Dataset
    values: np.ndarray  # unit rows [N, C]
    labels: np.ndarray  # int64 [N], -1 where unknown
    rows: np.ndarray  # int64 [N], of `dataset`
    numbers: np.ndarray  # int64 [N], of the whole dataset
    of: int  # images of the whole dataset

    def said(self) -> str:
        whole = f" of {self.of}" * (len(self.values) < self.of)
        return f"{len(self.values)}{whole} images of {self.name}"


def views_of(run: Run) -> Section:
    """Training images as they are, and as the networks see them."""
    train, readable = run.data.train, {}
    for row in np.random.RandomState(FLAGS.seed).permutation(len(train))[: 2 * SHOWN_VIEWS]:
        with contextlib.suppress(UnreadableImage):
            readable[row] = originals.open_original(train, row, FLAGS.max_pixels)
    rows = np.sort(list(readable)[:SHOWN_VIEWS])
    some = subsets.take(train, rows, "shown")
    unreadable = Unreadable(len(some), 1, max_pixels=FLAGS.max_pixels)
    names = ["teacher sees", "student sees"] if len(run.views) == 2 else ["both see"]
    drawn = numbered_views(some, run.views, FLAGS.image_size, FLAGS.seed, unreadable)
    shown_rows = []
    for row, (*views, _) in zip(rows, drawn, strict=True):
        original = readable[row]
        size = f"{original.width} x {original.height}"
        pictures = [pages.picture(original, "a training image", f"row {row}\n{size}")]
        for name, recipe, view in zip(names, run.views, views, strict=True):
            pixels = _as_pixels(augment.finish(view).numpy())[0]
            pictures.append(pages.picture(pixels, f"what the {name}", f"{name}\n{recipe}"))
        shown_rows.append(Row(pictures))
    description = "Training images, and one draw of what the networks see."
    tensorboard.write_rows(run.workdir / "logs", "views", shown_rows, run.step, description)
    return Section("Views", description, rows=shown_rows)


class Seen:
    """What is seen in the images of a run, by its student as it is at a step.

    Attributes:
        near_duplicates: test images that look like a training image, of how many; and of how many
            training images, of how many. None until they were looked for.
    """

    def __init__(self, run: Run, step: int):
        self.run, self.step = run, step
        self.student = run.encoder("student")
        self.near_duplicates = None

    def sections(self):
        """All that is seen; each part that fails says why."""
        parts = {
            "Neighbours": self.neighbors,
            "Near-duplicates": self.duplicates,
            "Anchors": self.anchors,
            "Clusters": self.clusters,
            "Map": self.map,
            "Confusion": self.confusion,
        }
        return [self.guarded(title, part) for title, part in parts.items()]

    def guarded(self, title, part):
        try:
            with self.run.explaining():
                return part(title)
        except Exception as error:
            logging.debug("Where this was found:", exc_info=error)
            return Section(title, f"Left out: {sentence(error)}")

    @functools.cached_property
    def asked(self):
        data = self.run.data
        return self.sample(data.test or data.bank, ASKED)

    @functools.cached_property
    def searched(self):
        return self.sample(self.run.data.bank, SEARCHED)

    def sample(self, dataset, count):
        part, total = dataset, len(dataset)
        drawn = np.arange(min(count, total))
        if total > count:
            # Of a stream the first: drawing from all of it would read all of it.
            if not isinstance(dataset, RecordDataset):
                drawn = some_of(total, count)
            part = subsets.take(dataset, drawn, f"{count} of {total}")
        found = self.run.features(self.student, part)
        values = features.unit_rows(found.values)
        return Sample(
            dataset.name, part, values, found.labels, found.rows, drawn[found.rows], total
        )

    @property
    def querying(self):
        return self.asked if self.run.data.test else self.searched

    @functools.cached_property
    def asking(self):
        """Places in `querying` of the images that ask: without a test split, of training images."""
        count = len(self.querying.labels)
        return np.arange(count) if self.run.data.test else some_of(count, ASKED)

    @functools.cached_property
    def nearest(self):
        """Of each image that asks: places in `searched`, nearest first, and cosines."""
        if self.run.data.test is None:
            return search.nearest_to_rows(self.searched.values, self.asking, NEIGHBORS)
        k = min(NEIGHBORS, len(self.searched.values))
        return knn.nearest(self.asked.values, self.searched.values, k)

    def predictions(self):
        return self.searched.labels[self.nearest[0][:, 0]]

    def neighbors(self, title):
        found, similarities = self.nearest
        queries, random = self.querying, np.random.RandomState(FLAGS.seed)
        labels = queries.labels[self.asking]
        if labels.min() >= 0 and self.searched.labels.min() >= 0:
            right = self.predictions() == labels
            kinds = {"The nearest is of another class": ~right, "The nearest is right": right}
        else:
            kinds = {"": np.ones(len(found), bool)}
        rows = []
        for heading, chosen in kinds.items():
            places = random.permutation(np.flatnonzero(chosen))[:QUERIES]
            for number, place in enumerate(np.sort(places)):
                query = self.picture(queries, self.asking[place], "query")
                others = [
                    self.picture(self.searched, row, f"cosine {cosine:.2f}", against=labels[place])
                    for row, cosine in zip(found[place], similarities[place], strict=True)
                ]
                rows.append(Row([query, *others], heading * (number == 0)))
        text = f"An image, and those nearest to it among {self.searched.said()}."
        tensorboard.write_rows(self.run.workdir / "logs", "neighbours", rows, self.step, text)
        return Section(title, text, rows=rows)

    def picture(self, sample, place, note, against=None):
        """An image of a sample, framed by whether it is of the class that it is held against."""
        label = sample.labels[place]
        name = self.class_name(label)
        kind = ""
        if against is not None and label >= 0 and against >= 0:
            kind = "right" if label == against else "wrong"
        note = f"{note}\n{name}" if name else note
        alt = f"{name or 'an image'}, row {sample.numbers[place]}"
        try:
            row = int(sample.rows[place])
            image = originals.open_original(sample.dataset, row, FLAGS.max_pixels)
        except UnreadableImage as error:
            return Picture("data:,", 1, 1, alt, f"{note}\n{error}", kind)
        return pages.picture(image, alt, note, kind)

    def class_name(self, label):
        names = self.run.data.bank.class_names
        if label < 0:
            return ""
        return shown(str(names[label])) if names else f"class {label}"

    def small(self, sample, places, side):
        """Some images of a sample, cut square and made small: uint8 [n, side, side, 3]."""
        found = np.zeros((len(places), side, side, 3), np.uint8)
        for image, row in zip(found, sample.rows[places], strict=True):
            with contextlib.suppress(UnreadableImage):
                original = originals.open_original(sample.dataset, int(row), FLAGS.max_pixels)
                image[:] = ImageOps.fit(original, (side, side))
        return found

    def duplicates(self, title):
        """Test images that look the same as a training image."""
        if self.run.data.test is None:
            return None
        found, similarities = self.nearest
        alike = np.flatnonzero(similarities[:, 0] > SIMILAR)
        pairs = []
        if len(alike):
            ours = self.small(self.asked, alike, COMPARED_SIDE)
            theirs = self.small(self.searched, found[alike, 0], COMPARED_SIDE)
            difference = np.sqrt(np.square(ours.astype(float) - theirs).mean(axis=(1, 2, 3)))
            pairs = alike[difference <= SAME_LOOK]
        searched = self.searched
        self.near_duplicates = len(pairs), len(found), len(searched.values), searched.of
        if not len(pairs):
            return None
        rows = [
            Row([
                self.picture(self.asked, place, f"test, row {self.asked.numbers[place]}"),
                self.picture(
                    searched, found[place, 0],
                    f"training, row {searched.numbers[found[place, 0]]}",
                ),
            ])
            for place in pairs[:QUERIES]
        ]  # fmt: skip
        text = (
            f"{len(pairs)} of {len(found)} test images look the same as the one nearest to them "
            f"among {searched.said()}: at {COMPARED_SIDE} x {COMPARED_SIDE} pixels they differ by "
            f"at most {SAME_LOOK:g} of 255 (root mean square). Rows are counted from 0."
        )
        return Section(title, text, rows=rows)

    def anchors(self, title):
        """The paper's figure 1."""
        reason = evaluations.reason_not_to("neighbors", self.run)
        if reason:
            return Section(title, f"Left out: {reason}")
        asked = run_data.asked_images(self.run.data)
        rows = np.random.RandomState(FLAGS.seed).permutation(len(asked))[:QUERIES]
        found = evaluations.find_neighbors(self.run, np.sort(rows), NEIGHBORS)
        shown_rows = []
        for i, label in enumerate(found.query_labels):
            name = self.class_name(label)
            pictures = [
                pages.picture(
                    _as_pixels(found.query_views[i]), name or "query", f"teacher sees\n{name}"
                )
            ]
            if found.other_views is not None:
                other = _as_pixels(found.other_views[i])
                pictures.append(pages.picture(other, "the student's view", "student sees\nMoCo: 1"))
            for j, view in enumerate(found.anchor_views[i]):
                other = found.anchor_labels[i, j]
                known = label >= 0 and other >= 0
                kind = ("right" if other == label else "wrong") if known else ""
                note = f"{found.probabilities[i, j]:.2g}\n{self.class_name(other)}"
                alt = f"anchor {j + 1}, {self.class_name(other)}"
                pictures.append(pages.picture(_as_pixels(view), alt, note, kind))
            shown_rows.append(Row(pictures))
        text = (
            "What the student is to learn (the paper's figure 1): the anchors of the queue that "
            "the teacher finds nearest to a view, with its probabilities. Contrastive learning "
            "asks for 1 at the image's other view, and for 0 at all of these."
        )
        return Section(title, text, rows=shown_rows)

    def clusters(self, title):
        """The paper's figure 3."""
        sample = self.querying
        known = [label for label in np.unique(sample.labels) if label >= 0]
        count = FLAGS.clusters or (len(known) if len(known) > 1 else CLUSTERS)
        count = max(1, min(count, len(sample.values) // MEMBERS))
        of_sample = features.Features(sample.values, sample.labels, sample.rows)
        found = clusters.cluster(of_sample, count, FLAGS.seed)
        members = clusters.draw_members(found.assignments, CLUSTERS, MEMBERS, FLAGS.seed)
        rows = [Row([self.picture(sample, place, "") for place in group]) for group in members]
        text = (
            f"Random members of {len(members)} of {count} clusters (k-means) of {sample.said()} "
            "(the paper's figure 3)."
        )
        return Section(title, text, rows=rows)

    def map(self, title):
        sample = self.querying
        places = np.sort(np.random.RandomState(FLAGS.seed).permutation(len(sample.values))[:MAPPED])
        values = sample.values[places]
        if len(places) < 3:
            raise ValueError(f"A map needs three images. Received: {len(places)}.")
        plane, how = _plane(values)
        labels = sample.labels[places]
        known = np.unique(labels[labels >= 0])
        colors = {label: i % len(pages.MAP_COLORS) for i, label in enumerate(known)}
        grid, columns, rows = pages.sprite(self.small(sample, places, TILE))
        tensorboard.write_projector(self.run.workdir / "logs", values, [
            self.class_name(label) or f"row {row}"
            for label, row in zip(labels, sample.numbers[places], strict=True)
        ], grid, TILE)  # fmt: skip
        dots = [
            Dot(
                float(x), float(y), colors.get(label, 0), i % columns, i // columns,
                self.class_name(label) or f"row {sample.numbers[place]}",
            )
            for i, (place, label, (x, y)) in enumerate(zip(places, labels, plane, strict=True))
        ]  # fmt: skip
        legend = [(colors[label], self.class_name(label)) for label in known]
        legend = legend if len(legend) <= len(pages.MAP_COLORS) else []
        text = (
            f"{len(places)} images of {sample.name} by their features, on a plane by "
            f"{how}. A dot shows its image under the pointer."
        )
        if len(known) > len(pages.MAP_COLORS):
            text += " Several classes share a colour."
        return Section(
            title, text, map=pages.Map(pages.data_uri(grid), columns, rows, dots, legend)
        )

    def confusion(self, title):
        labels = self.querying.labels[self.asking]
        if labels.min() < 0 or self.searched.labels.min() < 0:
            return Section(title, "Left out: the images have no labels.")
        if len(np.unique(self.searched.labels)) == 1:
            return Section(title, "Left out: there is one class.")
        classes = max(labels.max(), self.searched.labels.max()) + 1
        predicted = self.predictions()
        text = f"What the nearest of {self.searched.said()} takes {len(labels)} images for."
        if classes <= LARGEST_CONFUSION:
            matrix = confusion.confusion_matrix(labels, predicted, classes)
            shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
            names = [self.class_name(label) for label in range(classes)]
            table = pages.Confusion(names, matrix.tolist(), shares.tolist())
            return Section(title, text, confusion=table)
        wrong = labels != predicted
        pairs, counts = np.unique(
            np.stack([labels, predicted], 1)[wrong], axis=0, return_counts=True
        )
        order = np.argsort(-counts, kind="stable")[:CONFUSED_PAIRS]
        rows = [
            (self.class_name(pairs[i, 0]), self.class_name(pairs[i, 1]), int(counts[i]))
            for i in order
        ]
        text += f" Of {classes} classes, the pairs that are confused most often."
        return Section(title, text, tables=[Table(("true", "predicted", "images"), rows)])


def some_of(total: int, count: int) -> np.ndarray:
    """Draws so many of `total` rows by the seed, in their order."""
    return np.sort(np.random.RandomState(FLAGS.seed).permutation(total)[:count])


def _as_pixels(views):
    """Views [..., 3] for people to look at, uint8."""
    return np.round(255 * photometric.denormalize(views)).astype(np.uint8)


def _plane(values):
    """Places [N, 2] in [0, 1] of features on a plane, and how they were found.

    Raises:
        ValueError: for features that are all the same, on which scikit-learn's t-SNE crashes.
    """
    if not np.ptp(values, axis=0).max() > SAME_FEATURES:
        raise ValueError("All images have the same features: a map would show a single point.")
    if len(values) >= 12:
        tsne = sklearn.manifold.TSNE(
            init="pca", perplexity=min(30, (len(values) - 1) / 3), random_state=0
        )
        plane, how = tsne.fit_transform(values), "t-SNE"
    else:
        plane, how = sklearn.decomposition.PCA(2).fit_transform(values), "their two main directions"
    low, high = plane.min(axis=0), plane.max(axis=0)
    return (plane - low) / np.maximum(high - low, 1e-12), how
