"""Read files over HTTP and HTTPS."""
