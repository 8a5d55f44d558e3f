-- lease(holder, lease) -> answer; see breaker.lua; done is 1: admitted, 2: with a permit, 0: denied
-- Ask to make a call: in HALF_OPEN for a permit, and where calls in flight are limited for a slot. Both are leases in
-- a sorted set, of which only so many may be live. A denial writes nothing that could lengthen a lease.
-- KEYS, ARGV 1..13: see breaker.lua
-- ARGV  14 holder   who asks
--       15 lease    ms
-- Needs breaker.lua

local HOLDER, LEASE_END = ARGV[14], integer(now + math.min(tonumber(ARGV[15]), LONGEST_LEASE))

-- A lease that ends later than any may is of a clock that was ahead.
local function cut(leases)
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', leases, '(' .. integer(now + LONGEST_LEASE), '+inf')) do
    redis.call('ZADD', leases, integer(now + LONGEST_LEASE), member)
  end
end

-- Trials of this epoch, whatever has become of them, and in all those that are in flight.
local function trials_used()
  local own, prefix = field('ok') + field('ko'), state.epoch .. ':'
  for _, member in ipairs(redis.call('ZRANGE', TRIALS, 0, -1)) do
    own = own + (string.sub(member, 1, #prefix) == prefix and 1 or 0)
  end
  return math.max(own, live(TRIALS))
end

-- core/rules.py's concurrency_limit
local function limit()
  local most, since = rules.most_in_flight, field('ramp_since')
  if most == 0 or state.state == 'DISABLED' or state.state == 'SHADOW' then
    return math.huge
  elseif rules.least_in_flight > 0 then
    most = math.min(math.max(field('learned'), rules.least_in_flight), most)
  end
  local elapsed = since > 0 and now - since or rules.ramp
  if elapsed < 0 or elapsed >= rules.ramp then
    return most
  end
  return math.max(1, math.floor(most * (rules.ramp + 9 * elapsed) / (10 * rules.ramp)))
end

load_breaker()
save()
cut(TRIALS)
cut(SLOTS)
local permit, most, is_trial = state.epoch .. ':' .. HOLDER, limit(), state.state == 'HALF_OPEN'
local is_refused = state.state == 'OPEN' or state.state == 'FORCED_OPEN'
if is_refused or not (most == math.huge or holds(SLOTS, HOLDER) or live(SLOTS) < most) then
  return answer(0)
end
if is_trial then
  local is_new = not redis.call('ZSCORE', TRIALS, permit) and trials_used() < rules.trial_calls
  if not is_new and not holds(TRIALS, permit) then
    return answer(0)
  end
  redis.call('ZADD', TRIALS, 'GT', LEASE_END, permit)
end
if most < math.huge then
  redis.call('ZREMRANGEBYSCORE', SLOTS, '-inf', integer(now))
  redis.call('ZADD', SLOTS, 'GT', LEASE_END, HOLDER)
end
return answer(is_trial and 2 or 1)
