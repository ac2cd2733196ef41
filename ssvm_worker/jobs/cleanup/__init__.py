"""The job that removes leftovers, backups past retention, unneeded packs and old records."""
