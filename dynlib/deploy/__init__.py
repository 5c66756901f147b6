"""On a machine of one's own: the manager as a service, and its clients.

Nothing is imported here: a client needs the standard library alone.
"""
