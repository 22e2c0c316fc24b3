"""What objects hold besides weights: found by a walk, noted, restored, compared."""
