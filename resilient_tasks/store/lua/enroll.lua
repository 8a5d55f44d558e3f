-- enroll(key, most, idle_after) -> 1 if there is room for a child of that key, else 0
-- Those that nobody has used for `idle_after` ms make room, but for hot ones.
-- KEYS  1 children   sorted set   key -> when it was last used, ms
--       2 hot        set          keys of children that are not plainly CLOSED
-- ARGV  1 key
--       2 most         children
--       3 idle_after   ms

local MOST_FORGOTTEN = 1000 -- in one go
local now = now_ms()

local function forget_idle()
  local before = string.format('%.0f', now - tonumber(ARGV[3]))
  local idle = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', before, 'LIMIT', 0, MOST_FORGOTTEN)
  local forgotten = 0
  for _, key in ipairs(idle) do
    if redis.call('SISMEMBER', KEYS[2], key) == 0 then
      forgotten = forgotten + redis.call('ZREM', KEYS[1], key)
    end
  end
  return forgotten > 0
end

local used_at = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not used_at and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) and not forget_idle() then
  return 0
end
redis.call('ZADD', KEYS[1], 'GT', string.format('%.0f', now), ARGV[1])
return 1
