"""Servers that run what is exported. A server is imported by its own modules here alone, which it
loads itself."""
