"""``ssvm serve``: objects out of directory stores, and uploads in, over HTTP and by signed links."""
