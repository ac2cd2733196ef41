"""What `ssvm demo` shows, and the neighbours that it brings along."""
