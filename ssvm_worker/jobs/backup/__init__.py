"""Back up a VMware snapshot."""
