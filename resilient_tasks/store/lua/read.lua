-- read() -> JSON {snapshot, with hot_children}
-- A look at one breaker that writes nothing. An unknown one is CLOSED in epoch 0.
-- KEYS, ARGV: see state.lua
-- Needs rules.lua

load_breaker(false)
local seen = snapshot()
seen.hot_children = KEY and {} or redis.call('SMEMBERS', HOT)
return cjson.encode({ snapshot = seen })
