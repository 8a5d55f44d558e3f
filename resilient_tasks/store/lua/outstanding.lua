-- outstanding(change) -> nothing
-- Add to, or take off, the resumed tasks that no worker has taken up yet; never below 0.
-- KEYS  1 pace     hash   batch, failures_seen, outstanding
-- ARGV  1 change   integer

local outstanding = tonumber(redis.call('HGET', KEYS[1], 'outstanding') or 0) + tonumber(ARGV[1])
redis.call('HSET', KEYS[1], 'outstanding', string.format('%.0f', math.max(0, outstanding)))
