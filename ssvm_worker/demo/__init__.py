"""``ssvm demo`` and the servers that it starts: an S3 server, a vCenter simulator and a web server."""
