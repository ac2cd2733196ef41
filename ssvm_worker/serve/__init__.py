"""``ssvm serve``: sends objects of directory stores and receives uploads, over HTTP and with signed links."""
