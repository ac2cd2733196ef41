"""Open sockets that obey the address rule and detect stalls, and parse URLs."""
