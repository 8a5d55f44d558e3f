-- Move messages out of a deferred queue or its dead letters, each only if it is still there.
--
-- One whose destination is no list is dead-lettered. A script that fails half-way keeps what it has done, so
-- each message is pushed before it is removed.
--
-- KEYS[1]     list  where they lie, oldest last
-- KEYS[2]     list  its dead letters
-- KEYS[3..n]  list  where else messages may go
-- ARGV        triples: message as it waits, index of its destination in KEYS (0: nowhere), message as it shall arrive
-- returns     one 1 (moved), 2 (dead-lettered instead) or 0 (was gone) per triple
local function push(destination, message, as_it_waits)
  local pushed = redis.pcall('LPUSH', KEYS[destination], message)
  if type(pushed) == 'table' and pushed.err then
    redis.call('LPUSH', KEYS[2], as_it_waits)
    return 2
  end
  return 1
end

-- Changes nothing, but after its first write a script is refused no memory: the messages have their places already.
redis.call('LTRIM', KEYS[1], 0, -1)
local moved = {}
for i = 1, #ARGV, 3 do
  local message, destination = ARGV[i], tonumber(ARGV[i + 1])
  local made = redis.call('LPOS', KEYS[1], message, 'RANK', -1) and 1 or 0
  if made == 1 then
    if destination > 0 then
      made = push(destination, ARGV[i + 2], message)
    end
    redis.call('LREM', KEYS[1], -1, message)
  end
  moved[#moved + 1] = made
end
return moved
