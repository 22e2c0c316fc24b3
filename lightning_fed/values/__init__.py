"""What travels and what is counted: weights, metrics, data."""
