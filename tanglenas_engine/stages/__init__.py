"""The four stages: search, discretize, retrain, evaluate."""
