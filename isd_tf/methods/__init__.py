"""Methods, a file each, and the pair, queue and losses that they share."""
