"""The job that uploads a stored object to S3 or to an HTTP server."""
