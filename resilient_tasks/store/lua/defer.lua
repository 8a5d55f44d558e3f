-- defer(task_id, deadline) -> nothing
-- Index a deferred task under the time of its first deferral, and the end of its wait (defer_for, expires), if any.
-- KEYS  1 deferred    sorted set   task id -> deferred at, ms
--       2 deadlines   sorted set   task id -> end of its wait, ms
-- ARGV  1 task_id
--       2 deadline    ms, or empty

redis.call('ZADD', KEYS[1], 'NX', string.format('%.0f', now_ms()), ARGV[1])
if ARGV[2] == '' then
  redis.call('ZREM', KEYS[2], ARGV[1])
else
  redis.call('ZADD', KEYS[2], ARGV[2], ARGV[1])
end
