"""The Celery side: tasks that receive messages and run the jobs of the library."""
