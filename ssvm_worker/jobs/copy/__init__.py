"""The job that copies artifacts between image stores."""
