"""Boot a copy of disks in a virtual machine on this worker, to show that they boot."""
