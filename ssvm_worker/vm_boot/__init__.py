"""A virtual machine on this worker that shows whether a copy of somebody's disks boots."""
