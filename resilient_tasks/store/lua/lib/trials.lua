-- Trials and their permits, as core/machine.py has them; change the two together.
-- Needs slots.lua
-- Needs tripping.lua
-- Needs transitions.lua

local function count_trial(outcome)
  dirty = true
  learn(outcome, 1)
  if outcome == 'SUCCESS' or outcome == 'SLOW' then
    record.last_success_at = now
  end
  if outcome == 'FAILURE' or (outcome ~= 'SUCCESS' and rules.slow_trial_fails) then
    record.trial_failures = record.trial_failures + 1
    record.total_failures = record.total_failures + 1
  else
    record.trial_successes = record.trial_successes + 1
  end
end

-- Leave HALF_OPEN as soon as its trials have decided.
local function judge(cause, retry_after)
  local of_trials = ' of ' .. integer(rules.trial_calls) .. ' trials '
  if record.trial_successes >= rules.needed then
    enter('CLOSED', integer(record.trial_successes) .. of_trials .. 'succeeded', '')
    record.ramp_since = now
  elseif record.trial_failures > rules.trial_calls - rules.needed then
    open(with_cause(integer(record.trial_failures) .. of_trials .. 'failed', cause), '', retry_after)
  end
end

-- Count permits whose lease has run out: their holders died or hang.
local function expire()
  for holder, lease_end in pairs(trials) do
    if lease_end <= now then
      trials[holder] = nil
      count_trial('FAILURE')
    end
  end
  judge('permit expired')
end

-- Hand out a permit if one more trial can still matter, and is not one too many at once. A denial changes nothing.
local function grant(holder, lease)
  local used = record.trial_successes + record.trial_failures
  for _ in pairs(trials) do
    used = used + 1
  end
  if not trials[holder] and math.max(used, live_trials()) >= rules.trial_calls then
    return false
  end
  trials[holder] = math.max(trials[holder] or 0, now + lease)
  dirty = true
  return true
end

-- A straggler's outcome comes too late to count.
local function free_straggler(holder, outcome)
  if outcome ~= 'OVERDUE' and stragglers[holder] then
    stragglers[holder], left = nil, true
    announce()
  end
end

local function settle_trial(holder, outcome, cause, retry_after)
  if outcome == 'OVERDUE' then -- it is counted and still in flight
    stragglers[holder], left = trials[holder], true
  end
  trials[holder] = nil
  if outcome == 'IGNORED' then
    announce()
  else
    count_trial(outcome)
    judge(cause, retry_after)
  end
end
