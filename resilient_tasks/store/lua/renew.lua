-- renew(lease, holder, ...) -> array of 1 and 0, in the order of the holders
-- Lengthen live permits and slots to `lease` ms from now; 0: that holder has none.
-- KEYS  1 trials   sorted set   epoch:holder of a permit -> end of its lease, ms
--       2 slots    sorted set   holder -> end of its lease, ms
-- ARGV  1 lease    ms, at most 60,000
--       2.. holders

local now, renewed, held = now_ms(), {}, {}
local lease_end = string.format('%.0f', now + math.min(tonumber(ARGV[1]), 60000))

local function renew(leases, member, number)
  if tonumber(redis.call('ZSCORE', leases, member) or 0) > now then
    redis.call('ZADD', leases, 'GT', lease_end, member)
    renewed[number] = 1
  end
end

for _, member in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  local holder = string.match(member, '^%d+:(.*)$') or ''
  held[holder] = held[holder] or {}
  table.insert(held[holder], member)
end
for i = 2, #ARGV do
  renewed[i - 1] = 0
  renew(KEYS[2], ARGV[i], i - 1)
  for _, permit in ipairs(held[ARGV[i]] or {}) do
    renew(KEYS[1], permit, i - 1)
  end
end
return renewed
