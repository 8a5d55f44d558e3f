-- revoke(keep_for, most, name, ...) -> nothing
-- Remember what was revoked; forget what is older than `keep_for`, and the oldest beyond `most`.
-- KEYS  1 revoked    sorted set   task id or stamp -> revoked at, ms
-- ARGV  1 keep_for   ms
--       2 most       integer
--       3.. names

local now = now_ms()
for i = 3, #ARGV do
  redis.call('ZADD', KEYS[1], string.format('%.0f', now), ARGV[i])
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now - tonumber(ARGV[1])))
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -1 - tonumber(ARGV[2]))
