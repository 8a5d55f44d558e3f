-- tick_age(what) -> ms since that was last noted, or nothing if it never was
-- KEYS  1 tick   hash   holder, until (ms), completed (ms), sender_seen (ms)
-- ARGV  1 what   'completed' or 'sender_seen'

local noted = redis.call('HGET', KEYS[1], ARGV[1])
return noted and now_ms() - tonumber(noted)
