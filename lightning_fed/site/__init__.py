"""A site of a federation: a plain script that joins a SuperLink with its own module, code and data."""
