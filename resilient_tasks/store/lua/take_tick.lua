-- take_tick(token, ttl) -> 1 if the caller now holds the tick's lease, else 0
-- KEYS  1 tick    hash   holder, until (ms), completed (ms), sender_seen (ms)
-- ARGV  1 token   of this holder and this tick
--       2 ttl     ms

local now, ttl = now_ms(), tonumber(ARGV[2])
local held_until = tonumber(redis.call('HGET', KEYS[1], 'until') or 0) or 0
if held_until > now and held_until <= now + 10 * ttl then -- else a clock was ahead
  return 0
end
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'until', string.format('%.0f', now + ttl))
return 1
