-- note_tick(what) -> nothing
-- Note that a tick has run to its end, or that whoever sends ticks is alive.
-- KEYS  1 tick   hash   holder, until (ms), completed (ms), sender_seen (ms)
-- ARGV  1 what   'completed' or 'sender_seen'

redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f', now_ms()))
