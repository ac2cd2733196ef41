"""Create objects from settings. Only this package names concrete classes."""
