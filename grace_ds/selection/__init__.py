"""How a coreset is chosen: prior, sampling, objectives."""
