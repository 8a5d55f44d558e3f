-- settle(holder, epoch, outcome) -> answer; see breaker.lua; done is 1 if the holder had a slot
-- Give a permit and a slot back, with what the call has found out. OVERDUE says that it still runs: it keeps both.
-- KEYS, ARGV 1..13: see breaker.lua
-- ARGV  14 holder    of the permit or the slot
--       15 epoch     in which the call was admitted
--       16 outcome   SUCCESS, FAILURE, SLOW, IGNORED or OVERDUE
-- Needs breaker.lua

local HOLDER, EPOCH, OUTCOME = ARGV[14], ARGV[15], ARGV[16]
local ENDED = OUTCOME ~= 'OVERDUE'

-- core/rules.py's learn
local function learn()
  local least, credit = rules.least_in_flight, field('credit') + 1
  local limit = math.min(math.max(field('learned'), least), rules.most_in_flight)
  if OUTCOME ~= 'SUCCESS' then
    put('learned', math.max(least, math.floor(limit * 9 / 10)))
    put('credit', 0)
    put('backed_off', 1)
  elseif 2 * live(SLOTS) >= limit and limit < rules.most_in_flight then
    local grows = field('backed_off') == 0 or credit >= limit
    put('learned', grows and limit + 1 or limit)
    put('credit', grows and 0 or credit)
  end
end

local function count_trial()
  if OUTCOME == 'SUCCESS' or (OUTCOME == 'SLOW' and not rules.slow_counts) then
    put('ok', field('ok') + 1)
  elseif OUTCOME ~= 'IGNORED' then
    put('ko', field('ko') + 1)
    put('total_failures', field('total_failures') + 1)
  end
  if OUTCOME == 'SUCCESS' or OUTCOME == 'SLOW' then
    put('last_success_at', now)
  end
end

load_breaker()
local permit, freed = EPOCH .. ':' .. HOLDER, false
local lease_end = tonumber(redis.call('ZSCORE', TRIALS, permit) or 0)
local is_own = state.state == 'HALF_OPEN' and state.epoch == EPOCH
-- One that has run out stays, as a failed trial of this epoch; one of an earlier epoch is in flight and no more.
if lease_end > now and is_own and (ENDED or rules.slow_counts) then
  redis.call('ZREM', TRIALS, permit)
  if not ENDED then
    redis.call('ZADD', TRIALS, integer(lease_end), '0:' .. HOLDER)
  end
  count_trial()
  freed = OUTCOME == 'IGNORED'
elseif ENDED and not is_own then
  freed = redis.call('ZREM', TRIALS, permit) == 1
end
local has_slot = holds(SLOTS, HOLDER)
if has_slot and rules.least_in_flight > 0 and OUTCOME ~= 'IGNORED' then
  learn()
end
if ENDED then
  freed = redis.call('ZREM', TRIALS, '0:' .. HOLDER) == 1 or freed
  redis.call('ZREM', SLOTS, HOLDER)
end
if freed then -- those that were denied may ask again
  put('version', field('version') + 1)
end
save()
if freed then
  publish()
end
return answer(has_slot and 1 or 0)
