-- tally(teller, number, counts, peaks) -> nothing
-- Add what a process has counted; the same batch, sent again, changes nothing.
-- KEYS  1..15 see state.lua
--       16 tellers  sorted set   process -> number of its latest batch
-- ARGV  1 teller    name of the process
--       2 number    of the batch; grows
--       3 counts    JSON {kind: count}
--       4 peaks     JSON {kind: value}, of which an outage keeps the highest
-- Needs history.lua

local MOST_TELLERS, FORGOTTEN = 1000, 3600000
local told = redis.call('ZSCORE', KEYS[16], ARGV[1])
if told and tonumber(told) >= tonumber(ARGV[2]) then
  return
end
tally_all('', cjson.decode(ARGV[3]))
save_tallies(LATE)
for kind, value in pairs(is_under_way(LATE) and cjson.decode(ARGV[4]) or {}) do
  if value > tonumber(redis.call('HGET', OUTAGE, kind) or 0) then
    redis.call('HSET', OUTAGE, kind, integer(value))
  end
end
redis.call('ZADD', KEYS[16], ARGV[2], ARGV[1])
redis.call('ZREMRANGEBYRANK', KEYS[16], 0, -1 - MOST_TELLERS)
redis.call('PEXPIRE', KEYS[16], FORGOTTEN)
