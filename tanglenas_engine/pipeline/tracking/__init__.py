"""MLflow runs of the stages: what is tracked, the store that takes it, and what waits on disk for the store."""
