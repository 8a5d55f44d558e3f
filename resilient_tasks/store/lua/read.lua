-- read() -> JSON {snapshot}
-- A look at one breaker that writes nothing. An unknown one is CLOSED in epoch 0.
-- KEYS, ARGV: see state.lua

load_breaker(false)
return cjson.encode({ snapshot = snapshot() })
