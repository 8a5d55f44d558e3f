-- read(declares, most) -> answer; see breaker.lua
-- Look at a breaker. An unknown one is CLOSED in epoch 0, or what an older release has left it in.
-- KEYS, ARGV 1..13: see breaker.lua
-- ARGV  14 declares   1: it comes into being if it is unknown; 0: nothing is written
--       15 most       children: registers this child, if there is room for it, those unused for an hour making room;
--                     done is 1 if so. Missing: nothing is registered
-- Needs breaker.lua

local function register(most)
  if redis.call('ZADD', CHILDREN, 'NX', integer(now), KEY) == 0
    or redis.call('ZCARD', CHILDREN) <= most
    or redis.call('ZREMRANGEBYSCORE', CHILDREN, '-inf', integer(now - IDLE_AFTER)) > 0 then
    return 1
  end
  redis.call('ZREM', CHILDREN, KEY)
  return 0
end

if ARGV[14] == '0' and redis.call('EXISTS', STATE) == 0 then
  begin('0')
else
  load_breaker()
end
if ARGV[14] == '1' then
  save()
end
return answer(ARGV[15] and register(tonumber(ARGV[15])))
