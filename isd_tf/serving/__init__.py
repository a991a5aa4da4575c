"""The encoder on its way out."""
