"""Ties to the host frameworks."""
