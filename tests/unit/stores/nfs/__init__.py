"""Tests of stores on NFS."""
