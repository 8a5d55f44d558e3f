-- attend(longest_absence, worker) -> number of living workers
-- Count the workers that have attended lately, after noting that one of them does.
-- KEYS  1 workers           sorted set   worker -> when it last attended, ms
-- ARGV  1 longest_absence   ms after which a worker is no longer counted
--       2 worker            who attends; empty: nobody, only count

local now = now_ms()
if ARGV[2] ~= '' then
  redis.call('ZADD', KEYS[1], string.format('%.0f', now), ARGV[2])
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now - tonumber(ARGV[1])))
return redis.call('ZCARD', KEYS[1])
