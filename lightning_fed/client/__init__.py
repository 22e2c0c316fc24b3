"""The clients' side: a Flower ClientApp around a Lightning fit."""
