"""Build the k-NN graph over Dask, inside the job."""
