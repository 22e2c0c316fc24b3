"""One client's Lightning fit."""
