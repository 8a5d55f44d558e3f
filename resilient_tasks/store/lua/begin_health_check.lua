-- begin_health_check(since) -> 1 if the caller is to make a health check, 0 if one has begun since then
-- KEYS, ARGV 1..4: see breaker.lua
-- ARGV  5 since   ms
-- Needs breaker.lua

load_breaker()
local checked_at = field('checked_at')
local is_mine = checked_at < tonumber(ARGV[5]) or checked_at > now or checked_at == 0
if is_mine then
  put('checked_at', now)
end
save()
return is_mine and 1 or 0
