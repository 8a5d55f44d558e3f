-- The rules of a breaker: core/machine.py in Lua, over what state.lua has loaded.
-- Same functions, same arithmetic: change the two together, a property test compares them.
-- Needs shadow.lua
-- Needs children.lua
-- Needs trials.lua

local TARGETS = { trip = 'OPEN', isolate = 'FORCED_OPEN', disable = 'DISABLED', shadow = 'SHADOW', reset = 'CLOSED' }

-- counting ------------------------------------------------------------------------------

-- 0: admitted before the store knew this breaker; true for as long as it has not changed since.
local function is_current(epoch)
  return epoch == record.epoch or (epoch == 0 and record.epoch == record.first_epoch)
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
  local failed = outcome == 'FAILURE' and record.failed_checks + 1 or 0
  dirty = dirty or failed ~= record.failed_checks
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
