-- revoke(keep_for, most, task_id, ...) -> nothing
-- Remember revoked task ids; forget those older than `keep_for`, and the oldest beyond `most`.
-- KEYS  1 revoked    sorted set   task id -> revoked at, ms
-- ARGV  1 keep_for   ms
--       2 most       integer
--       3.. task ids

local now = now_ms()
for i = 3, #ARGV do
  redis.call('ZADD', KEYS[1], string.format('%.0f', now), ARGV[i])
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now - tonumber(ARGV[1])))
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -1 - tonumber(ARGV[2]))
