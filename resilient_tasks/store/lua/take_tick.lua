-- take_tick(token, ttl) -> 1 if the caller now holds the tick's lease, else 0
-- KEYS  1 tick    hash   holder, until (ms), completed (ms), sender_seen (ms)
-- ARGV  1 token   of this holder and this tick
--       2 ttl     ms

local now = now_ms()
local held_until = tonumber(redis.call('HGET', KEYS[1], 'until') or 0)
if held_until > now then
  return 0
end
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'until', string.format('%.0f', now + tonumber(ARGV[2])))
return 1
