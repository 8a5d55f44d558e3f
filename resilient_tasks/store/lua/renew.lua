-- renew(lease, holder, ...) -> array of 1 and 0, in the order of the holders
-- Lengthen live permits and slots to `lease` ms from now; 0: that holder has none.
-- KEYS  1 trials       sorted set   holder of a permit -> end of its lease, ms
--       2 stragglers   sorted set   the same, of trials that outlived their HALF_OPEN
--       3 slots        sorted set   the same, of slots
-- ARGV  1 lease    ms
--       2.. holders

local now = now_ms()
local lease_end = now + tonumber(ARGV[1])
local renewed = {}
for i = 2, #ARGV do
  renewed[i - 1] = 0
  for _, leases in ipairs(KEYS) do
    local held_until = tonumber(redis.call('ZSCORE', leases, ARGV[i]) or now)
    if held_until > now then
      renewed[i - 1] = 1
    end
    if held_until > now and held_until < lease_end then
      redis.call('ZADD', leases, string.format('%.0f', lease_end), ARGV[i])
    end
  end
end
return renewed
