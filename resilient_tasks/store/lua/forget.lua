-- forget(task_id, ...) -> nothing
-- Take tasks off the index of those that wait; when none is left, the breaker's outage may be over.
-- KEYS  4 deferred    sorted set   task id -> deferred at, ms
--       5 deadlines   sorted set   task id -> end of its wait, ms
--       8..12 see history.lua
-- ARGV  task_id, ...; none: all of them
-- Needs history.lua

if #ARGV == 0 then
  redis.call('DEL', KEYS[4], KEYS[5])
else
  redis.call('ZREM', KEYS[4], unpack(ARGV))
  redis.call('ZREM', KEYS[5], unpack(ARGV))
end
mark_drained()
