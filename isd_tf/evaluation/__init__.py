"""Evaluation protocols, one a file, on features of frozen encoders (features.py)."""
