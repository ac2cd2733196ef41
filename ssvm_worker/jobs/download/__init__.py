"""The job that downloads a template, ISO or volume."""
