"""Services that a run needs: files, weights, checkpoints, devices, processes, seeds, progress and tracking."""
