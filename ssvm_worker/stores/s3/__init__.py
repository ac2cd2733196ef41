"""Store objects in S3 buckets."""
