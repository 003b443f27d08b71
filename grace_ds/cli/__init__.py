"""Provide the command line, ``grace-ds``."""
