"""The job that copies or moves files which may have no manifest."""
