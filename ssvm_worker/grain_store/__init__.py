"""The grain store: incremental backups that each restore alone, and share what they have in common."""
