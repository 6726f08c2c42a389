"""A server of rewards over HTTP."""
