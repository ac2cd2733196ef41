"""The secondary storage agent of a CloudStack zone: it speaks to the management server instead of the Java agent.

- ``frame``: one message as bytes: header, JSON, compression.
- ``link``: TLS and records on a TCP connection.
- ``session``: connect, pings, and the rules about order and time.
- ``messages`` and ``commands``: what the server asks for, as jobs.
"""
