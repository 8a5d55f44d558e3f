-- The rules of a breaker: core/machine.py in Lua, over what state.lua has loaded.
-- Same functions, same arithmetic: change the two together, a property test compares them.

local TARGETS = { trip = 'OPEN', isolate = 'FORCED_OPEN', disable = 'DISABLED', shadow = 'SHADOW', reset = 'CLOSED' }

-- transitions ---------------------------------------------------------------------------

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

-- counting ------------------------------------------------------------------------------

-- 0: admitted before the store knew this breaker; true for as long as it has not changed since.
local function is_current(epoch)
  return epoch == record.epoch or (epoch == 0 and record.epoch == record.first_epoch)
end

-- The first point of a run that trips, given one that does not; the last one does.
local function bisect(sums, run, calm)
  local tripped = run.count
  while tripped - calm > 1 do
    local middle = math.floor((calm + tripped) / 2)
    if rate_trips(plus(sums, run, middle)) then
      tripped = middle
    else
      calm = middle
    end
  end
  return tripped
end

-- Which of a run of equal outcomes opens the breaker (1 for the first), or nil.
local function trip_point(run)
  local sums, count, point = figures(), run.count, run.count + 1
  local missing = minimum_tasks() - sums.tasks
  if missing > 0 and plus(sums, run, count).tasks < minimum_tasks() then
    return nil
  end
  if rules.consecutive > 0 and run.outcome == 'FAILURE' then
    point = math.min(point, math.max(1, rules.consecutive - record.row, missing))
  end
  -- Within the rest of a run each rate only grows or only falls, so two looks tell whether it trips at all.
  local first = math.max(1, rules.minimum_calls - sums.calls, missing)
  if first <= count and rate_trips(plus(sums, run, first)) then
    point = math.min(point, first)
  elseif first < count and rate_trips(plus(sums, run, count)) then
    point = math.min(point, bisect(sums, run, first))
  end
  return point <= count and point or nil
end

-- What outcomes mean beside the window; one that is OVERDUE may still turn out either way.
local function note(outcome, count)
  dirty = true
  if outcome == 'FAILURE' then
    record.row = record.row + count
    record.total_failures = record.total_failures + count
  elseif outcome ~= 'OVERDUE' then
    record.row = 0
    record.last_success_at = now
  end
end

local function count_calls(run, count)
  if count > 0 then
    window_add(run, count)
    if record.would_open == 1 then
      add_shadow_calls(count)
    end
    note(run.outcome, count)
    learn(run.outcome, count)
  end
end

local function with_cause(reason, cause)
  return cause == '' and reason or reason .. ', last: ' .. cause
end

-- Why the breaker trips now, in words.
local function why(cause)
  local sums = figures()
  local rate = rate_trips(sums)
  if not rate then
    return with_cause(integer(record.row) .. ' consecutive failures', cause)
  end
  local part = rate == 'failure' and sums.failures or sums.slow
  local percent = math.floor((200 * part + sums.calls) / (2 * sums.calls))
  local reason = rate .. ' rate ' .. integer(percent) .. ' % of ' .. integer(sums.calls) .. ' calls'
  return rate == 'failure' and with_cause(reason, cause) or reason
end

local function trip(reason, retry_after)
  if record.state == 'CLOSED' and has_room_to_open() then
    open(reason, '', retry_after)
  elseif record.state == 'SHADOW' then
    add_shadow_opening(retry_after)
    announce()
    tell('SHADOW', reason, '')
  end
end

-- Take an opening in SHADOW whose time is over to have healed.
local function end_shadow_opening()
  local openings = shadow_openings()
  if record.would_open == 1 and openings[#openings][2] <= now then
    record.would_open, record.row, record.failed_checks, dirty = 0, 0, 0, true
    start_window()
  end
end

local function report_run(run, cause, retry_after)
  local tripped_at = record.would_open == 0 and trip_point(run) or nil
  count_calls(run, tripped_at or run.count)
  if tripped_at then
    trip(why(cause), retry_after)
    if COUNTING[record.state] then
      count_calls(run, run.count - tripped_at)
    end
  end
end

-- Make of a vote what has become of its call, or what another run of its task has found.
local function change(slot, voted, run, cause, retry_after)
  if run.outcome == 'FAILURE' and voted ~= 'F' then
    vote_becomes_failure(slot, run)
    note('FAILURE', 1)
    local sums = figures()
    if record.would_open == 0 and (row_trips(record.row, sums) or rate_trips(sums)) then
      trip(why(cause), retry_after)
    end
  elseif run.outcome == 'SLOW' then
    if voted == 'O' then
      change_vote(slot, run.voter, 'SLOW')
    end
    note('SLOW', 1)
  end
end

-- Count a task's calls: all of them, or if they are whole runs only its first vote in the window.
local function vote(run, cause, retry_after)
  local slot, voted = vote_of(run.voter)
  local rest = run.count - 1
  if not slot then
    remember_vote(run)
    report_run({ outcome = run.outcome, count = 1, voter = '', proxied = run.proxied }, cause, retry_after)
  elseif voted == 'O' or not run.each then
    change(slot, voted, run, cause, retry_after)
  else
    rest = run.count
  end
  if run.each and rest > 0 and COUNTING[record.state] then
    remember_vote(run)
    run.count = rest
    report_run(run, cause, retry_after)
  end
end

-- trials --------------------------------------------------------------------------------

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
      tally_trial('FAILURE', 'permit expired')
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

-- what callers ask for --------------------------------------------------------------------

local function advance()
  if record.state == 'OPEN' and now >= record.open_until then
    enter('HALF_OPEN', 'open time is over', '')
  elseif record.state == 'HALF_OPEN' then
    expire()
  end
end

-- Nobody is let in beyond the limit; a task that waits makes a crowd.
local function turn_away(task, waits)
  set_slot(task, 0)
  if waits and crowd(now + CROWDED_FOR) then
    announce()
  end
end

local function acquire(holder, lease, task, waits, has_room)
  advance()
  local offered = has_room and offers_slot(holder, task)
  local granted = record.state == 'HALF_OPEN' and offered and grant(holder, lease)
  local admitted = granted or (ADMITTING[record.state] == true and offered)
  if admitted then
    take_slot(holder, lease, task)
  elseif record.state == 'CLOSED' then
    turn_away(task, waits)
  end
  return admitted, granted
end

local function report(epoch, runs, cause, retry_after)
  end_shadow_opening()
  for _, told in ipairs(runs) do
    if not COUNTING[record.state] or not is_current(epoch) then
      return
    end
    local run = { outcome = told[1], count = told[2], voter = told[3] or '', proxied = told[4], each = told[5] }
    if run.outcome ~= 'IGNORED' and run.count > 0 then
      if run.voter ~= '' and run.outcome ~= 'SUCCESS' then
        vote(run, cause, retry_after)
      else
        run.voter = ''
        report_run(run, cause, retry_after)
      end
    end
  end
end

local function settle(holder, outcome, evidence)
  local epoch, cause, retry_after = evidence.epoch, evidence.cause, evidence.retry_after
  if record.state == 'HALF_OPEN' then
    expire()
  end
  if holds_slot(holder) then
    report(epoch, evidence.runs[1] and evidence.runs or { { outcome, 1 } }, cause, retry_after)
  end
  if epoch ~= record.epoch or not trials[holder] then
    free_straggler(holder, outcome)
  elseif outcome ~= 'OVERDUE' or rules.slow_trial_fails then
    settle_trial(holder, outcome, cause, retry_after)
  end
  if outcome ~= 'OVERDUE' then
    set_slot(holder, 0)
  end
end

local function keep_slots(tasks, lease, most)
  local limit = concurrency_limit()
  if not limit then
    return #tasks
  end
  local kept, moved = keep_for(tasks, lease, math.min(limit, most))
  if moved then
    announce()
  end
  return kept
end

local function begin_health_check(since)
  if record.checked_at and record.checked_at >= since then
    return false
  end
  record.checked_at, dirty = now, true
  return true
end

local function report_health_check(epoch, outcome, limit, cause, retry_after)
  if not COUNTING[record.state] or not is_current(epoch) then
    return
  end
  end_shadow_opening()
  local before = record.failed_checks or 0 -- a record of an older release has none
  local failed = outcome == 'FAILURE' and before + 1 or 0
  dirty = dirty or failed ~= before
  record.failed_checks = failed
  if failed >= limit and record.would_open == 0 then
    trip(with_cause('health check failed ' .. integer(failed) .. ' times in a row', cause), retry_after)
  end
end

local function command(verb, reason, actor)
  if record.state == TARGETS[verb] then
    if verb == 'reset' then
      start_afresh()
    end
  elseif verb == 'trip' then
    open(reason, actor)
  else
    enter(TARGETS[verb], reason, actor)
    if verb == 'reset' then
      record.openings = 0
    end
  end
end

local function roll_up()
  local reason = record.state == 'CLOSED' and open_parent()
  if reason then
    open(reason, '')
  end
end
