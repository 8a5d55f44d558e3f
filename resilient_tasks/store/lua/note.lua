-- note(name, text, actor) -> nothing
-- Log what somebody has done by hand, beside the transitions.
-- KEYS  1 state   hash   of the breaker
--       8..12 see history.lua
-- ARGV  1 name    of the breaker
--       2 text    what was done
--       3 actor   who did it
-- Needs history.lua

local state, epoch = unpack(redis.call('HMGET', KEYS[1], 'state', 'epoch'))
log({
  name = ARGV[1], previous = state or 'CLOSED', state = state or 'CLOSED', epoch = tonumber(epoch or 0), at = now,
  reason = ARGV[2], actor = ARGV[3], calls = 0, failures = 0, slow = 0, would_open = false,
})
