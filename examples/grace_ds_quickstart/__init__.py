"""The main job, on data that every machine has: a small GPT on the Python standard library, with and without GRACE."""
