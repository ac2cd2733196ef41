"""Delete an artifact."""
