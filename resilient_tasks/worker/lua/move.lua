-- Move waiting messages out of a deferred queue, each only if it is still there.
--
-- One whose destination is no list is dead-lettered: a script that fails half-way would have lost it.
--
-- KEYS[1]     list  the deferred queue, oldest last
-- KEYS[2]     list  its dead letters
-- KEYS[3..n]  list  where else messages may go
-- ARGV        triples: message as it waits, index of its destination in KEYS (0: nowhere), message as it shall arrive
-- returns     one 1 (moved) or 0 (was gone) per triple
local moved = {}
for i = 1, #ARGV, 3 do
  local done = redis.call('LREM', KEYS[1], -1, ARGV[i])
  local destination = tonumber(ARGV[i + 1])
  if done == 1 and destination > 0 then
    local pushed = redis.pcall('LPUSH', KEYS[destination], ARGV[i + 2])
    if type(pushed) == 'table' and pushed.err then
      redis.call('LPUSH', KEYS[2], ARGV[i])
    end
  end
  moved[#moved + 1] = done
end
return moved
