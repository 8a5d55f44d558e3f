-- put(value, ttl) -> nothing
-- Keep a value with the time of writing. `until` decides when it ends; the key's expiry only tidies up.
-- KEYS  1 entry   hash   value, at (ms), until (ms)
-- ARGV  1 value   bytes
--       2 ttl     ms

local now = now_ms()
local ends_at = string.format('%.0f', now + tonumber(ARGV[2]))
redis.call('HSET', KEYS[1], 'value', ARGV[1], 'at', string.format('%.0f', now), 'until', ends_at)
redis.call('PEXPIRE', KEYS[1], ARGV[2])
