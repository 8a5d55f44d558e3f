-- defer(task_id, deadline, ...) -> nothing
-- Index deferred tasks under the time of their first deferral, and the end of their wait (defer_for, expires), if any.
-- KEYS  1 deferred    sorted set   task id -> deferred at, ms
--       2 deadlines   sorted set   task id -> end of its wait, ms
--       3 hot         set          keys of its parent's children that are not plainly CLOSED
-- ARGV  1 key         of the child that they wait for; empty if it is none
--       2.. pairs of
--         task_id
--         deadline    ms, or empty

local now = string.format('%.0f', now_ms())
if ARGV[1] ~= '' then
  redis.call('SADD', KEYS[3], ARGV[1])
end
for i = 2, #ARGV, 2 do
  redis.call('ZADD', KEYS[1], 'NX', now, ARGV[i])
  if ARGV[i + 1] == '' then
    redis.call('ZREM', KEYS[2], ARGV[i])
  else
    redis.call('ZADD', KEYS[2], ARGV[i + 1], ARGV[i])
  end
end
