"""Mount NFS exports and store objects on them."""
