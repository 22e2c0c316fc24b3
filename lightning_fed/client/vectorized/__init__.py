"""Many clients as one stacked model."""
