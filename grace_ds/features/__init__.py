"""Compute content features from token ids alone: quality, duplicates and a TF-IDF vector, once per sample."""
