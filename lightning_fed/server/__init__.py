"""The server's fit."""
