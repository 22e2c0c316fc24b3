"""The forms in which values travel and are kept."""
