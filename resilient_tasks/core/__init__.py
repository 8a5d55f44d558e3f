"""The breaker's rules as pure Python: no I/O, no clock of their own, no locks.

This is the readable specification. ``store/lua`` holds the same rules for the shared store;
a differential property test keeps the two in agreement.
"""
