"""A simulated CloudStack management server, for ``ssvm demo --cloudstack`` and for tests.

It has its own code for frames, so that it checks the code of ``ssvm agent`` independently.
"""
