"""The Celery side: the messages that wake workers up, and the bridge from them to the jobs of the library."""
