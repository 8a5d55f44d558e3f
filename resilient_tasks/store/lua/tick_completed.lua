-- tick_completed() -> nothing
-- Note that a tick has run to its end.
-- KEYS  1 tick   hash   holder, until (ms), completed (ms)

redis.call('HSET', KEYS[1], 'completed', string.format('%.0f', now_ms()))
