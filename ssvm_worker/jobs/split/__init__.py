"""The job that makes a template of one disk of an OVA."""
