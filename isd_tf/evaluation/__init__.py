"""Evaluation protocols, one a file. Each is handed encoders and batches, and loads no data."""
