-- defer(task_id, deadline, ...) -> nothing
-- Index deferred tasks under the time of their first deferral, and the end of their wait (defer_for, expires), if any.
-- KEYS  1 deferred    sorted set   task id -> deferred at, ms
--       2 deadlines   sorted set   task id -> end of its wait, ms
-- ARGV  pairs of
--         task_id
--         deadline    ms, or empty

local now = string.format('%.0f', now_ms())
for i = 1, #ARGV, 2 do
  redis.call('ZADD', KEYS[1], 'NX', now, ARGV[i])
  if ARGV[i + 1] == '' then
    redis.call('ZREM', KEYS[2], ARGV[i])
  else
    redis.call('ZADD', KEYS[2], ARGV[i + 1], ARGV[i])
  end
end
