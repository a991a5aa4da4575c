"""Finds images in what embed.py has embedded. One of:

    --query=IMAGE_FILE --model=MODEL   the images nearest to another one
    --row=N                            the images nearest to one of them, row N of paths.txt
    --near_duplicates=0.98             groups of images at least so similar
    --near_duplicates=0.98 --against=OTHER
                                       images that OTHER has too: train and test, for example
    --outliers=N                       the images least like those nearest to them
    --diverse=N                        images that cover all others, to label next

Similarity is the cosine of two embeddings; the search is exact. Each writes a table, in CSV and in
Parquet, and one HTML page with the pictures, which needs no network. docs/find.md says more.
"""

import argparse
import pathlib
import re

import program
from program import say

EXAMPLE = "python experiments/search.py --embeddings=embedded --near_duplicates=0.98"
# Of which the mean similarity makes a row an outlier.
OUTLIER_NEIGHBORS = 10


def main() -> None:
    program.prepare()
    parser = argparse.ArgumentParser(
        usage=EXAMPLE,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--embeddings", required=True, metavar="FOLDER", help="embed.py's --out")
    one_of = parser.add_mutually_exclusive_group(required=True)
    one_of.add_argument("--query", metavar="IMAGE_FILE", help="what to find the like of")
    one_of.add_argument("--row", type=int, metavar="N", help="the same, counted from 0")
    one_of.add_argument("--near_duplicates", type=float, metavar="T", help="similarity, up to 1")
    one_of.add_argument("--outliers", type=int, metavar="N", help="how many to find")
    one_of.add_argument("--diverse", type=int, metavar="N", help="how many to choose")
    parser.add_argument("--against", metavar="FOLDER", help="another --out of embed.py")
    parser.add_argument("--model", help="of --query: the one that made the embeddings")
    parser.add_argument(
        "--neighbors", type=int, default=20, metavar="K", help="of --query and --row; default 20"
    )
    parser.add_argument(
        "--engine",
        choices=("exact", "faiss"),
        default="exact",
        help="what searches nearest images: the package itself, the default, or faiss",
    )
    parser.add_argument("--out", help="folder of the results; default: search in --embeddings")
    settings = parser.parse_args()
    if (settings.query is None) != (settings.model is None):
        parser.error("--query and --model go together: the query is embedded as the others were.")
    if settings.against and settings.near_duplicates is None:
        parser.error("--against=FOLDER needs --near_duplicates=T, such as 0.98.")
    if settings.near_duplicates is not None and not 0 < settings.near_duplicates <= 1:
        parser.error(
            "--near_duplicates must be above 0 and at most 1. Received: "
            f"{settings.near_duplicates:g}."
        )
    for name in ("outliers", "diverse", "neighbors"):
        if (getattr(settings, name) or 0) < 1 and getattr(settings, name) is not None:
            parser.error(f"--{name} must be at least 1. Received: {getattr(settings, name)}.")
    if settings.engine != "exact" and settings.query is None and settings.row is None:
        if settings.outliers is None and not settings.against:
            parser.error(
                f"--engine={settings.engine} searches nearest images: for --query, --row, "
                "--outliers and --against. Leave it out here."
            )
    with program.in_sentences():
        search(settings)


def search(settings: argparse.Namespace) -> None:
    program.import_tensorflow()  # Here, as it takes seconds.
    import search_results

    from isd_tf.serving.collection import Collection

    collection = Collection.open(settings.embeddings)
    count = len(collection.embeddings())
    for name, least, most in (("row", 0, count - 1), ("outliers", 1, count), ("diverse", 1, count)):
        value = getattr(settings, name)
        if value is not None and not least <= value <= most:
            raise ValueError(
                f"--{name} must be from {least} to {most}, as there are {count} embeddings. "
                f"Received: {value}."
            )
    if settings.query or settings.row is not None:
        found = find_nearest(settings, collection)
    elif settings.against:
        found = find_shared(settings, collection, Collection.open(settings.against))
    elif settings.near_duplicates:
        found = find_near_duplicates(settings, collection)
    elif settings.outliers:
        found = find_outliers(settings, collection)
    else:
        found = choose_diverse(settings, collection)
    folder = pathlib.Path(settings.out or collection.folder / "search")
    written = search_results.write(found, folder)
    say(f"{found.summary}\nTable and pictures: {', '.join(map(str, written))}")


def find_nearest(settings, collection):
    import numpy as np
    from search_results import Found, Group, Picture, table_of

    from isd_tf.data.folders import shown
    from isd_tf.evaluation import search
    from isd_tf.serving import embed

    embeddings, k = collection.embeddings(), settings.neighbors
    engine = search.ENGINES[settings.engine]
    if settings.query:
        encoder = embed.load_encoder(settings.model)
        require_same_model(collection, encoder.sha256, f"--model={settings.model}")
        query = embed.embed_file(encoder, settings.query)
        rows, similarities = engine(query, embeddings, k)
        asked = Picture(None, settings.query, "the query")
        name = f"nearest_to_{re.sub(r'[^A-Za-z0-9_-]', '_', pathlib.Path(settings.query).stem)}"
    else:
        rows, similarities = search.nearest_to_rows(embeddings, np.array([settings.row]), k, engine)
        asked = Picture(collection, settings.row, f"the query, row {settings.row}")
        name = f"nearest_to_row_{settings.row}"
    rows, similarities = rows[0], similarities[0]
    nearest = [
        Picture(collection, row, f"{similarity:.4f}, row {row}")
        for row, similarity in zip(rows, similarities, strict=True)
    ]
    return Found(
        name,
        "Nearest images",
        f"The {len(rows)} images of {len(embeddings)} that are nearest to {shown(asked.name)}.",
        table_of(collection, rows, similarity=similarities),
        [Group("Query", [asked]), Group("Nearest, by similarity", nearest)],
    )


def find_near_duplicates(settings, collection):
    import numpy as np
    from search_results import Found, Group, Picture, table_of

    from isd_tf.evaluation import search

    embeddings, threshold = collection.embeddings(), settings.near_duplicates
    groups = search.near_duplicates(embeddings, threshold)
    similarities = [embeddings[members] @ embeddings[members[0]] for members in groups]
    pictured = [
        Group(
            f"Group {number}: {len(members)} images",
            [
                Picture(collection, row, f"{similarity:.4f}, row {row}")
                for row, similarity in zip(members, to_first, strict=True)
            ],
        )
        for number, (members, to_first) in enumerate(zip(groups, similarities, strict=True))
    ]
    members = np.concatenate([np.zeros(0, np.int64), *groups])
    numbers = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    to_first = np.concatenate([np.zeros(0, np.float32), *similarities])
    return Found(
        f"near_duplicates_{threshold:g}",
        "Near-duplicates",
        f"{len(groups)} group{'s' * (len(groups) != 1)} of images that a similarity of at least "
        f"{threshold:g} connects, with {len(members)} of {len(embeddings)} images. "
        "Similarities are to the first of the group.",
        table_of(collection, members, group=numbers, similarity_to_first=to_first),
        pictured,
    )


def find_shared(settings, collection, other):
    from search_results import Found, Group, Picture, table_of

    from isd_tf.evaluation import search

    require_same_model(
        collection, other.about["model"]["sha256"], f"the embeddings in --against={other.folder}"
    )
    embeddings, threshold = collection.embeddings(), settings.near_duplicates
    engine = search.ENGINES[settings.engine]
    theirs, similarities = (x[:, 0] for x in engine(embeddings, other.embeddings(), 1))
    order = (-similarities).argsort(kind="stable")
    rows = order[similarities[order] >= threshold - search.ROUNDING]
    theirs, similarities = theirs[rows], similarities[rows]
    pairs = zip(rows, theirs, similarities, strict=True)
    pictured = [
        Group(
            f"Similarity {similarity:.4f}",
            [Picture(collection, row, f"row {row}"), Picture(other, their, f"there row {their}")],
        )
        for row, their, similarity in pairs
    ]
    others = other.known()["path"].take(theirs)
    return Found(
        f"near_duplicates_{threshold:g}_against_{re.sub('[^A-Za-z0-9_-]', '_', other.folder.name)}",
        "Near-duplicates between two collections",
        f"{len(rows)} of the {len(embeddings)} images of {collection.about['images']['name']} have "
        f"one in {other.about['images']['name']} at a similarity of at least {threshold:g}; each "
        "is shown with the nearest there.",
        table_of(collection, rows, similarity=similarities, other_row=theirs, other_path=others),
        pictured,
    )


def find_outliers(settings, collection):
    from search_results import Found, Group, Picture, table_of

    from isd_tf.evaluation import search

    embeddings = collection.embeddings()
    rows, scores = search.outliers(
        embeddings, settings.outliers, OUTLIER_NEIGHBORS, search.ENGINES[settings.engine]
    )
    pictures = [
        Picture(collection, row, f"{score:.4f}, row {row}")
        for row, score in zip(rows, scores, strict=True)
    ]
    return Found(
        "outliers",
        "Outliers",
        f"The {len(rows)} images of {len(embeddings)} whose mean similarity to their "
        f"{min(OUTLIER_NEIGHBORS, len(embeddings) - 1)} nearest others is lowest.",
        table_of(collection, rows, mean_similarity=scores),
        [Group("Lowest mean similarity first", pictures)],
    )


def choose_diverse(settings, collection):
    from search_results import Found, Group, Picture, table_of

    from isd_tf.evaluation import search

    embeddings = collection.embeddings()
    rows, similarities = search.k_centres(embeddings, settings.diverse)
    pictures = [
        Picture(collection, row, f"{similarity:.4f}, row {row}")
        for row, similarity in zip(rows, similarities, strict=True)
    ]
    return Found(
        f"diverse_{settings.diverse}",
        "A diverse subset",
        f"{len(rows)} images of {len(embeddings)} that cover all others: each is the one least "
        "similar to those before it (greedy k-centre), the first the one most similar to the mean.",
        table_of(collection, rows, similarity_to_chosen=similarities),
        [
            Group(
                "In the order of choice, with the similarity to the nearest chosen before", pictures
            )
        ],
    )


def require_same_model(collection, sha256, what):
    known = collection.about["model"]
    if sha256 != known["sha256"]:
        raise ValueError(
            f"Embeddings can be compared if one encoder has made them. {collection.folder} is by "
            f"{known['name']} with the digest {known['sha256'][:12]}. Received: {what}, with the "
            f"digest {sha256[:12]}."
        )


if __name__ == "__main__":
    main()
