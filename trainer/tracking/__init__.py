"""What a run tells the world: records in files first, MLflow as their view."""
