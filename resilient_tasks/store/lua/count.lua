-- count(epoch, check, limit, outcome, number, task, each, was_overdue, ...) -> answer; see breaker.lua
-- Count outcomes of calls that were admitted in the present epoch: into the evidence, and into the sums for people.
-- The same lines as core/rules.py's Counter.
-- KEYS, ARGV 1..13: see breaker.lua
-- ARGV  14 epoch    in which the calls were admitted; 0: before the store knew the breaker
--       15 check    of a health check FAILURE or SUCCESS; empty: none was made
--       16 limit    failed checks in a row that open the breaker
--       17.. runs   of equal outcomes, oldest first, each five: outcome, number, task, each and was_overdue as 1 or ''
-- Needs breaker.lua

local UNIT, MOST_TASKS, BUCKETS = 1000000, 1000, 5
local calls, failed, slow = 0, 0, 0

local function clear(score)
  score.score, score.tasks, score.calls, score.bad = 0, 0, 0, 0
  redis.call('DEL', score.key)
end

local function load_score(kind, key, take)
  local kept = state[kind] or '0 0 0 0 0 0'
  local value, tasks, counted, bad, at, peak = string.match(kept, '(%d+) (%d+) (%d+) (%d+) (%d+) (%d+)')
  local score = {
    key = key, take = take, score = tonumber(value), tasks = tonumber(tasks), calls = tonumber(counted),
    bad = tonumber(bad), at = tonumber(at), peak = tonumber(peak),
  }
  if score.tasks + score.peak > 0 and math.abs(now - score.at) >= rules.window then
    score.peak = 0
    clear(score)
    score.is_changed = true
  end
  return score
end

local function save_score(kind, score)
  if score.is_changed then
    local format = '%.0f %.0f %.0f %.0f %.0f %.0f'
    put(kind, string.format(format, score.score, score.tasks, score.calls, score.bad, score.at, score.peak))
  end
end

-- Return how many the run adds to a score. Whole runs of a task add once while it is above 0.
local function add(score, number, task, each)
  local added, new = number, number
  if task ~= '' then
    local is_full = score.tasks >= MOST_TASKS
    new = is_full and 1 - redis.call('SISMEMBER', score.key, task) or redis.call('SADD', score.key, task)
    added = each and number or new
  end
  score.tasks, score.is_changed = score.tasks + new, true
  if added > 0 then
    local most = field('would_open') > 0 and math.max(score.score, rules.minimum_calls * UNIT) or math.huge
    score.score = math.min(score.score + added * UNIT, most)
    score.calls, score.bad, score.at = score.calls + added, score.bad + added, now
    redis.call('PEXPIRE', score.key, integer(rules.window + 60000))
  end
  score.peak = score.tasks >= rules.minimum_tasks and math.max(score.peak, score.score) or score.peak
  return added
end

local function take(score, number)
  if score.score > 0 then
    score.calls, score.is_changed = score.calls + number, true
    score.score = math.max(0, score.score - number * score.take)
    if score.score == 0 then
      clear(score)
    end
  end
end

-- Add to the sums for people.
local function sum_up()
  local index = math.floor(now / math.ceil(rules.window / (BUCKETS - 1)))
  local bucket = 'bucket_' .. index % BUCKETS
  local at, before, failed_before, slow_before = string.match(state[bucket] or '', '^(%d+) (%d+) (%d+) (%d+)$')
  if tonumber(at) ~= index then
    before, failed_before, slow_before = 0, 0, 0
  end
  put(bucket, string.format('%.0f %.0f %.0f %.0f', index, before + calls, failed_before + failed, slow_before + slow))
  if failed > 0 then
    put('total_failures', field('total_failures') + failed)
  end
end

local function weigh(failures, lates, outcome, number, task, each, was_overdue)
  calls = calls + number
  if outcome == 'FAILURE' then
    failed = failed + number
    put('row', field('row') + add(failures, number, task, each))
    if failures.tasks >= rules.minimum_tasks then
      put('row_peak', math.max(field('row_peak'), field('row')))
    end
  else
    slow = slow + (outcome == 'SLOW' and number or 0)
    put('row', 0)
    put('last_success_at', now)
    take(failures, number)
  end
  if outcome == 'SUCCESS' and not was_overdue then
    take(lates, number)
  elseif not was_overdue and (outcome == 'SLOW' or rules.slow_counts) then
    add(lates, number, task, each)
  end
end

local function count()
  local failures = load_score('failure', FAILURES, rules.failure_take)
  local lates = load_score('slow', SLOW, rules.slow_take)
  for i = 17, #ARGV, 5 do
    local outcome, number, task = ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2]
    if outcome == 'OVERDUE' and rules.slow_counts then
      add(lates, number, task, true)
    elseif outcome ~= 'OVERDUE' and outcome ~= 'IGNORED' and number > 0 then
      weigh(failures, lates, outcome, number, task, ARGV[i + 3] ~= '', ARGV[i + 4] ~= '')
    end
  end
  save_score('failure', failures)
  save_score('slow', lates)
  if calls > 0 then
    sum_up()
  end
end

load_breaker()
local is_current = ARGV[14] == state.epoch or (ARGV[14] == '0' and state.epoch == state.first)
if is_current and (state.state == 'CLOSED' or state.state == 'SHADOW') then
  count()
  if ARGV[15] ~= '' then
    put('failed_checks', ARGV[15] == 'FAILURE' and field('failed_checks') + 1 or 0)
    put('check_limit', ARGV[16])
  end
end
if KEY ~= '' then
  redis.call('ZADD', CHILDREN, 'GT', integer(now), KEY)
end
save()
return answer()
