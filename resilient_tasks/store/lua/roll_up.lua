-- roll_up() -> JSON {snapshot, transition}
-- Open a breaker if too large a share of its children is open.
-- KEYS, ARGV: see state.lua
-- Needs rules.lua

load_breaker(true)
roll_up()
return answer()
