"""Images on their way in: sources, decoding, subsets, and batches in order."""
