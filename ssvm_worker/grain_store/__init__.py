"""Store incremental backups as packs of grains. Each backup restores alone, and backups share equal grains."""
