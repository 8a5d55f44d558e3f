-- renew(lease, holder, ...) -> array of 1 and 0, in the order of the holders
-- Lengthen live permits and slots to `lease` ms from now; 0: that holder has none.
-- KEYS  1 trials   sorted set   epoch:holder of a permit -> end of its lease, ms
--       2 slots    sorted set   holder -> end of its lease, ms
-- ARGV  1 lease    ms, at most 60,000
--       2.. holders

local now, renewed, number = now_ms(), {}, {}
local lease_end = string.format('%.0f', now + math.min(tonumber(ARGV[1]), 60000))
for i = 2, #ARGV do
  number[ARGV[i]], renewed[i - 1] = i - 1, 0
end
for _, leases in ipairs(KEYS) do
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', leases, '(' .. string.format('%.0f', now), '+inf')) do
    local i = number[leases == KEYS[1] and string.match(member, '^%d+:(.*)$') or member]
    if i then
      redis.call('ZADD', leases, 'GT', lease_end, member)
      renewed[i] = 1
    end
  end
end
return renewed
