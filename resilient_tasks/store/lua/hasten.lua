-- hasten(task_id, ...) -> nothing
-- Have tasks looked at by the next tick, as if their time were over; those that do not wait are passed over.
-- KEYS  1 deferred    sorted set   task id -> deferred at, ms
--       2 deadlines   sorted set   task id -> end of its defer_for, ms
-- ARGV  1.. task ids

local now = now_ms()
for _, task_id in ipairs(ARGV) do
  if redis.call('ZSCORE', KEYS[1], task_id) then
    redis.call('ZADD', KEYS[2], 'LT', string.format('%.0f', now), task_id)
  end
end
