"""The tests, the servers that they use, and their test data."""
