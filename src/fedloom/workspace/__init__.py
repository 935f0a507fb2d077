"""A run's things: clients and job assembled from settings, its folder, its checkpoints, what it leaves."""
