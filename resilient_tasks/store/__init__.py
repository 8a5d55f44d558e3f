"""Where breaker state lives: the shared Redis/Valkey store, and ``core/`` run in this process.

``base`` names what a store must do; ``redis`` and ``local`` do it; ``view`` and ``reports`` are this
process's side of the traffic: a slightly stale copy of all states, and outcomes sent in batches.
"""
