"""The job that deletes an artifact."""
