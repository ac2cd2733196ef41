"""Download a template, ISO or volume."""
