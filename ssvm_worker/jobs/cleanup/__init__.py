"""Remove what no job and no rule needs."""
