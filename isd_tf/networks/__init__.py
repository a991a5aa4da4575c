"""Networks: encoders, heads and BatchNorm."""
