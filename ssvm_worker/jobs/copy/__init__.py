"""Copy artifacts between image stores."""
