"""The k-NN graph that carries scores from collected samples to the others."""
