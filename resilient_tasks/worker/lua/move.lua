-- Move waiting messages out of a deferred queue, each only if it is still there.
--
-- KEYS[1]     list  the deferred queue, oldest last
-- KEYS[2..n]  list  where messages may go
-- ARGV        triples: message as it waits, index of its destination in KEYS (0: nowhere), message as it shall arrive
-- returns     one 1 (moved) or 0 (was gone) per triple
local moved = {}
for i = 1, #ARGV, 3 do
  local gone = redis.call('LREM', KEYS[1], -1, ARGV[i]) == 0
  local destination = tonumber(ARGV[i + 1])
  if not gone and destination > 0 then
    redis.call('LPUSH', KEYS[destination], ARGV[i + 2])
  end
  moved[#moved + 1] = gone and 0 or 1
end
return moved
