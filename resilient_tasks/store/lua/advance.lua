-- advance() -> JSON {snapshot, transition}
-- Do what time has made due: OPEN becomes HALF_OPEN, expired permits become failures.
-- KEYS, ARGV: see state.lua
-- Needs rules.lua

load_breaker(true)
advance()
return answer()
