-- begin_health_check(since) -> 1 if the caller is to make a health check, 0 if somebody has begun one since then
-- KEYS, ARGV 1..4: see state.lua
-- ARGV  5 since   ms
-- Needs rules.lua

load_breaker(true)
local is_mine = begin_health_check(tonumber(ARGV[5]))
save()
return is_mine and 1 or 0
