-- settle(holder, epoch, outcome, trial, least, most) -> answer; see breaker.lua; done is 1 if the holder had a slot
-- Give a permit and a slot back, with what the call has found out. OVERDUE says that it still runs: it keeps both.
-- KEYS, ARGV 1..7: see breaker.lua
-- ARGV  8 holder     of the permit or the slot
--       9 epoch      in which the call was admitted
--       10 outcome   SUCCESS, FAILURE, SLOW, IGNORED or OVERDUE
--       11 trial     ok or ko, what it is worth as a trial; empty: nothing
--       12 least     of an adaptive limit of calls in flight, else 0
--       13 most      calls in flight
-- Needs breaker.lua

local HOLDER, EPOCH, OUTCOME, TRIAL, LEAST, MOST = ARGV[8], ARGV[9], ARGV[10], ARGV[11], tonumber(ARGV[12]), ARGV[13]
local ENDED = OUTCOME ~= 'OVERDUE'

-- core/rules.py's learn
local function learn()
  local limit, credit = math.min(math.max(field('learned'), LEAST), MOST), field('credit') + 1
  if OUTCOME ~= 'SUCCESS' then
    put('learned', math.max(LEAST, math.floor(limit * 9 / 10)))
    put('credit', 0)
    put('backed_off', 1)
  elseif 2 * live(SLOTS) >= limit and limit < tonumber(MOST) then
    local grows = field('backed_off') == 0 or credit >= limit
    put('learned', grows and limit + 1 or limit)
    put('credit', grows and 0 or credit)
  end
end

if not load_breaker() then
  return answer(-1)
end
local permit, freed = EPOCH .. ':' .. HOLDER, false
local lease_end = tonumber(redis.call('ZSCORE', TRIALS, permit) or 0)
local is_own = state.state == 'HALF_OPEN' and state.epoch == EPOCH
-- One that has run out stays, as a failed trial of this epoch; one of an earlier epoch is in flight and no more.
if lease_end > now and is_own and (ENDED or TRIAL ~= '') then
  redis.call('ZREM', TRIALS, permit)
  if not ENDED then
    redis.call('ZADD', TRIALS, integer(lease_end), '0:' .. HOLDER)
  end
  freed = TRIAL == ''
  if not freed then
    put(TRIAL, field(TRIAL) + 1)
    put('total_failures', field('total_failures') + (TRIAL == 'ko' and 1 or 0))
  end
  put('last_success_at', (OUTCOME == 'SUCCESS' or OUTCOME == 'SLOW') and now or field('last_success_at'))
elseif ENDED and not is_own then
  freed = redis.call('ZREM', TRIALS, permit) == 1
end
local has_slot = holds(SLOTS, HOLDER)
if has_slot and LEAST > 0 and OUTCOME ~= 'IGNORED' then
  learn()
end
if ENDED then
  freed = redis.call('ZREM', TRIALS, '0:' .. HOLDER) == 1 or freed
  redis.call('ZREM', SLOTS, HOLDER)
end
if freed then -- those that were denied may ask again
  put('version', field('version') + 1)
  publish()
end
save()
return answer(has_slot and 1 or 0)
