-- read(declares) -> answer; see breaker.lua
-- Look at a breaker. An unknown one is CLOSED in epoch 0, or what an older release has left it in.
-- KEYS, ARGV 1..7: see breaker.lua
-- ARGV  8 declares   1: it comes into being if it is unknown; 0: nothing is written
-- Needs breaker.lua

if ARGV[8] == '0' and redis.call('EXISTS', STATE) == 0 then
  begin('0')
else
  load_breaker()
end
if ARGV[8] == '1' then
  save()
end
return answer()
