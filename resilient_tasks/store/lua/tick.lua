-- tick(token, ttl) -> 1 if the caller now holds the tick's lease, else 0
-- Take the lease of the tick, or give it back if it is still the caller's.
-- KEYS  1 tick    hash   holder, until (ms), completed (ms), sender_seen (ms)
-- ARGV  1 token   of this holder and this tick
--       2 ttl     ms; 0: give it back

local now, ttl = now_ms(), tonumber(ARGV[2])
local kept = redis.call('HMGET', KEYS[1], 'holder', 'until')
local held_until = tonumber(kept[2] or 0) or 0
if ttl == 0 and kept[1] == ARGV[1] then
  redis.call('HDEL', KEYS[1], 'holder', 'until')
elseif ttl > 0 and (held_until <= now or held_until > now + 10 * ttl) then -- the latter: a clock was ahead
  redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'until', string.format('%.0f', now + ttl))
  return 1
end
return 0
