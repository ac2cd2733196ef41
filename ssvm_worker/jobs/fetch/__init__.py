"""The job that downloads files as they are."""
