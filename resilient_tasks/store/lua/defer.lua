-- defer(task_id, deadline, since, ...) -> nothing
-- Index deferred tasks under the time of their first deferral, also if they were resumed since, and the end of
-- their wait (defer_for, expires), if any.
-- KEYS  1 deferred    sorted set   task id -> first deferred at, ms
--       2 deadlines   sorted set   task id -> end of its wait, ms
--       3 active      sorted set   keys of its parent's children that are not plainly CLOSED -> last transition, ms
-- ARGV  1 key         of the child that they wait for; empty if it is none
--       2.. triples of
--         task_id
--         deadline    ms, or empty
--         since       ms of its first deferral; empty: now

local now = string.format('%.0f', now_ms())
if ARGV[1] ~= '' then
  redis.call('ZADD', KEYS[3], now, ARGV[1])
end
for i = 2, #ARGV, 3 do
  redis.call('ZADD', KEYS[1], 'NX', ARGV[i + 2] == '' and now or ARGV[i + 2], ARGV[i])
  if ARGV[i + 1] == '' then
    redis.call('ZREM', KEYS[2], ARGV[i])
  else
    redis.call('ZADD', KEYS[2], ARGV[i + 1], ARGV[i])
  end
end
