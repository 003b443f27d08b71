"""Provide helpers that several folders share."""
