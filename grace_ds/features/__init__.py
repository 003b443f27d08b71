"""Content: what the token ids alone tell of a sample. Quality, duplicates and a TF-IDF vector, computed once per sample."""
