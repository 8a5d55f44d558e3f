"""The breaker's rules as pure Python: no I/O, no clock of their own, no locks.

``rules.decide`` is the one place where a change of state is decided; every store runs it on what it has counted.
"""
