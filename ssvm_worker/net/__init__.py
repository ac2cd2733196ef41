"""Open sockets that obey the address rule and notice stalls; parse URLs."""
