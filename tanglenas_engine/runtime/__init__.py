"""What a run needs of the machine: files, weights, checkpoints, devices, processes, seeds, progress, tracking."""
