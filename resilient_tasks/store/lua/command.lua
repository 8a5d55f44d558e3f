-- command(verb, reason, actor) -> JSON {snapshot, transition}
-- Carry out an operator's verb.
-- KEYS, ARGV 1..4: see state.lua
-- ARGV  5 verb     trip, isolate, disable, shadow or reset
--       6 reason   as the operator gave it
--       7 actor    who
-- Needs rules.lua

load_breaker(true)
command(ARGV[5], ARGV[6], ARGV[7])
return answer()
