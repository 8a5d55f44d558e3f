-- transition(version, forgets, share, field, value, ...) -> answer; see breaker.lua; done is 1 for the one
-- caller that made the change, 0 if the breaker is no longer as it was seen
-- KEYS, ARGV 1..13: see breaker.lua
-- ARGV  14 version   as it was seen; it grows with every transition and with every permit that becomes free
--       15 forgets   1: the evidence is emptied
--       16 share     of the active children that may be held open, if the change opens one; 0: any
--       17..        fields and values that are written
-- Needs breaker.lua

local function has_room(share)
  local active = redis.call('ZCOUNT', CHILDREN, '(' .. integer(now - rules.window), '+inf')
  return share == 0 or redis.call('ZCOUNT', CHILDREN, '+inf', '+inf') + 1 <= share * active
end

load_breaker()
if state.version ~= ARGV[14] or not has_room(tonumber(ARGV[16])) then
  save()
  return answer(0)
end
for i = 17, #ARGV, 2 do
  put(ARGV[i], ARGV[i + 1])
end
redis.call('ZREMRANGEBYSCORE', TRIALS, '-inf', integer(now))
if ARGV[15] == '1' then
  redis.call('DEL', FAILURES, SLOW)
end
if KEY ~= '' then
  local is_held_open = state.state == 'OPEN' or state.state == 'HALF_OPEN' or state.state == 'FORCED_OPEN'
  redis.call('ZADD', CHILDREN, is_held_open and '+inf' or integer(now), KEY)
  redis.call('ZADD', ACTIVE, integer(now), KEY)
end
save()
publish()
return answer(1)
