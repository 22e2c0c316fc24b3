"""What objects hold besides weights: found by a walk, noted, put back, compared."""
