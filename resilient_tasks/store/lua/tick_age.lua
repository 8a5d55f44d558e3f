-- tick_age() -> ms since a tick last ran to its end, or nothing if none ever did
-- KEYS  1 tick   hash   holder, until (ms), completed (ms)

local completed = redis.call('HGET', KEYS[1], 'completed')
return completed and now_ms() - tonumber(completed)
