-- leave_tick(token) -> nothing
-- Give the tick's lease back, if it is still this holder's.
-- KEYS  1 tick    hash   holder, until (ms), completed (ms), sender_seen (ms)
-- ARGV  1 token   of this holder and this tick

if redis.call('HGET', KEYS[1], 'holder') == ARGV[1] then
  redis.call('HDEL', KEYS[1], 'holder', 'until')
end
