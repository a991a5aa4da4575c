"""embed.py on many machines, by Apache Beam: the same output, whose shards its workers write.

    python experiments/embed_beam.py --images=photos --model=runs/x/saved_model --out=embedded \\
        --runner=DirectRunner --direct_running_mode=multi_processing --direct_num_workers=2

What follows the flags of embed.py goes to Beam: --runner=FlinkRunner, SparkRunner and so on. Every
worker needs isd_tf, and sees images, model and OUT under the same paths. A shard that is done is
not done again, so that the same command continues; one that two workers did is the same.
"""

import argparse
import os

import program
from embed import add_flags, finish
from program import say

EXAMPLE = "python experiments/embed_beam.py --images=photos --model=runs/x/saved_model --out=out"


def main() -> None:
    program.prepare()
    parser = argparse.ArgumentParser(
        usage=EXAMPLE, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    settings, for_beam = parser.parse_known_args()
    with program.in_sentences():
        embed(settings, for_beam)


def embed(settings: argparse.Namespace, for_beam: list[str]) -> None:
    program.import_tensorflow()  # Here, as it takes seconds.
    try:
        import apache_beam as beam
    except ImportError:
        raise ModuleNotFoundError(
            "This program needs Apache Beam: in the repository pip install '.[beam]', into an "
            "environment of its own. embed.py does without."
        ) from None
    import workdirs
    from apache_beam.options.pipeline_options import PipelineOptions

    # Workers have other working directories.
    for name in ("model", "out", "data_dir"):
        if getattr(settings, name):
            setattr(settings, name, os.path.abspath(getattr(settings, name)))
    if not settings.images.startswith("tfds:"):
        settings.images = os.path.abspath(settings.images)
    model, out = settings.model, settings.out
    source = {name: getattr(settings, name) for name in ("images", "split", "data_dir")}

    class EmbedShard(beam.DoFn):
        """Here, so that Beam takes it to its workers by value: they do not know this file."""

        def setup(self):
            from isd_tf.data import datasets
            from isd_tf.serving import embed

            self.dataset = datasets.load_collection(**source)
            self.encoder = embed.load_encoder(model)
            # Refused where the worker sees other images, or another model.
            self.collection = embed.begin(out, self.encoder, self.dataset, source)

        def process(self, number):
            from isd_tf.serving import embed

            embed.embed_shards(self.encoder, self.dataset, self.collection, [number])
            yield number

    worker = EmbedShard()
    worker.setup()
    dataset, collection = worker.dataset, worker.collection
    with workdirs.lock(collection.folder, "--out"):
        collection.remove_unfinished()
        workdirs.name_left_out(collection.folder, dataset)
        if collection.missing:
            say(f"{len(collection.missing)} of {collection.shards} shards are to be written.")
            with beam.Pipeline(options=PipelineOptions(for_beam)) as pipeline:
                numbers = pipeline | beam.Create(collection.missing) | beam.Reshuffle()
                numbers | beam.ParDo(EmbedShard())
        finish(collection, dataset)


if __name__ == "__main__":
    main()
