"""From a pretrained encoder to a classifier."""
