-- How a breaker moves from one state to another: the transitions of core/machine.py in Lua; change the two together.
-- Needs window.lua

local function announce()
  record.version = record.version + 1
  changed, dirty = true, true
end

local function tell(previous, reason, actor)
  local sums = figures()
  transition = {
    name = NAME, previous = previous, state = record.state, epoch = record.epoch, at = now, reason = reason,
    actor = actor, calls = sums.calls, failures = sums.failures, slow = sums.slow, would_open = record.would_open == 1,
  }
end

-- What is in flight when the breaker moves on stays in flight.
local function leave_trials()
  local running = {}
  for _, permits in ipairs({ stragglers, trials }) do
    for holder, lease_end in pairs(permits) do
      running[holder] = lease_end > now and lease_end or nil
    end
  end
  left = next(running) ~= nil or next(stragglers) ~= nil
  stragglers = running
end

local function start_window()
  window, trials, touched, cleared = {}, {}, {}, true
end

-- Never an epoch that another store has been in: a replica that has missed the last transition, or the
-- breaker of a process that was cut off.
local function next_epoch()
  return math.max(record.epoch + 1, now)
end

local function enter(state, reason, actor)
  local previous, openings = record.state, openings_left()
  local frozen = COUNTING[state] and no_sums() or figures()
  local ended = {
    state = state, since = now, reason = reason, actor = actor, openings = openings, row = 0, trial_successes = 0,
    trial_failures = 0, would_open = 0, failed_checks = 0, epoch = next_epoch(), frozen_calls = frozen.calls,
    frozen_failures = frozen.failures, frozen_slow = frozen.slow, frozen_proxied = frozen.proxied,
  }
  for field, value in pairs(ended) do
    record[field] = value
  end
  if state == 'SHADOW' then
    record.shadow = ''
  end
  record.open_until, record.ramp_since = nil, nil
  leave_trials()
  start_window()
  announce()
  tell(previous, reason, actor)
end

local function open(reason, actor, retry_after)
  enter('OPEN', reason, actor)
  record.openings = record.openings + 1
  record.open_until = now + open_for(record.openings, retry_after)
end

local function start_afresh()
  start_window()
  record.row, record.openings, record.failed_checks, record.ramp_since = 0, 0, 0, nil
  announce()
end
