-- renew(lease, holder, ...) -> array of 1 and 0, in the order of the holders
-- Lengthen live permits to `lease` ms from now; 0: that holder has none.
-- KEYS  1 trials   sorted set   holder of a permit -> end of its lease, ms
-- ARGV  1 lease    ms
--       2.. holders

local now = now_ms()
local lease_end = now + tonumber(ARGV[1])
local renewed = {}
for i = 2, #ARGV do
  local held_until = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[i]) or now)
  renewed[i - 1] = held_until > now and 1 or 0
  if held_until > now and held_until < lease_end then
    redis.call('ZADD', KEYS[1], string.format('%.0f', lease_end), ARGV[i])
  end
end
return renewed
