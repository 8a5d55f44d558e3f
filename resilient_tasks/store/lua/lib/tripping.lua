-- When a breaker trips, and why: core/tripping.py in Lua. Same functions, same arithmetic: change the two together.
-- Needs window.lua

local function rate_trips(sums)
  if sums.calls < rules.minimum_calls or sums.tasks < rules.minimum_tasks then
    return nil
  end
  if sums.failures / sums.calls >= rules.failure_rate then
    return 'failure'
  end
  return sums.slow / sums.calls >= rules.slow_rate and 'slow' or nil
end

local function row_trips(row, sums)
  return rules.consecutive > 0 and row >= rules.consecutive and sums.tasks >= rules.minimum_tasks
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
  local missing = rules.minimum_tasks - sums.tasks
  if missing > 0 and plus(sums, run, count).tasks < rules.minimum_tasks then
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
