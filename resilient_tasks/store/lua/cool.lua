-- cool() -> 1 if the child is plainly CLOSED and nothing waits for it, so that nobody need look at it; else 0
-- KEYS, ARGV: see state.lua
-- Needs rules.lua

load_breaker(false)
if not is_plain() or redis.call('ZCARD', DEFERRED) > 0 then
  return 0
end
redis.call('SREM', HOT, KEY)
if redis.call('ZREM', OPENED, KEY) == 1 then -- its state has ended by itself
  redis.call('ZADD', CHILDREN, integer(now), KEY)
end
return 1
