"""The job that removes the snapshot of an ended backup job."""
