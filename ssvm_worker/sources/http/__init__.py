"""Download over HTTP and HTTPS."""
