"""Keep the record of all jobs in Redis. Only this package imports redis."""
