"""The k-NN graph that carries scores from harvested samples to the others."""
