"""The four stages as DVC runs them: gin in, a stage function of the engine, files and MLflow out."""
