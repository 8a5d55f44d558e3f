-- count(epoch, runs, check, limit) -> answer; see breaker.lua
-- Count outcomes of calls that were admitted in the present epoch: into the evidence, and into the sums for people.
-- The same lines as core/rules.py's Counter.
-- KEYS, ARGV 1..4: see breaker.lua
-- ARGV  5 epoch   in which the calls were admitted; 0: before the store knew the breaker
--       6 runs    JSON [[outcome, number, task, each, was_overdue], ...], oldest first
--       7 check   of a health check FAILURE or SUCCESS; empty: none was made
--       8 limit   failed checks in a row that open the breaker
-- Needs breaker.lua

local UNIT, MOST_TASKS, BUCKETS = 1000000, 1000, 5
local PARTS = { 'score', 'tasks', 'calls', 'bad', 'at', 'peak' }

local function clear(score)
  score.score, score.tasks, score.calls, score.bad = 0, 0, 0, 0
  redis.call('DEL', score.key)
end

local function load_score(kind, key, take)
  local score, numbers = { key = key, take = take }, string.gmatch(state[kind] or '0 0 0 0 0 0', '%d+')
  for _, part in ipairs(PARTS) do
    score[part] = tonumber((numbers()))
  end
  if math.abs(now - score.at) >= rules.window then
    score.peak = 0
    if score.tasks > 0 then
      clear(score)
    end
  end
  return score
end

local function save_score(kind, score)
  local numbers = {}
  for i, part in ipairs(PARTS) do
    numbers[i] = integer(score[part])
  end
  put(kind, table.concat(numbers, ' '))
end

-- Return how many the run adds to a score. Whole runs of a task add once while it is above 0.
local function add(score, number, task, each)
  local added, new = number, number
  if task ~= '' then
    new = 1 - redis.call('SISMEMBER', score.key, task)
    added = each and number or new
    if new == 1 and score.tasks < MOST_TASKS then
      redis.call('SADD', score.key, task)
    end
  end
  score.tasks = score.tasks + new
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
    score.calls = score.calls + number
    score.score = math.max(0, score.score - number * score.take)
    if score.score == 0 then
      clear(score)
    end
  end
end

-- Add to the sums for people.
local function sum_up(outcome, number)
  local index = math.floor(now / math.ceil(rules.window / (BUCKETS - 1)))
  local bucket = 'bucket_' .. index % BUCKETS
  local at, calls, failures, slow = string.match(state[bucket] or '', '^(%d+) (%d+) (%d+) (%d+)$')
  if tonumber(at) ~= index then
    calls, failures, slow = 0, 0, 0
  end
  local failed, late = outcome == 'FAILURE' and number or 0, outcome == 'SLOW' and number or 0
  put(bucket, string.format('%.0f %.0f %.0f %.0f', index, calls + number, failures + failed, slow + late))
  put('total_failures', field('total_failures') + failed)
end

local function weigh(failures, slow, outcome, number, task, each, was_overdue)
  if outcome == 'FAILURE' then
    put('row', field('row') + add(failures, number, task, each))
    if failures.tasks >= rules.minimum_tasks then
      put('row_peak', math.max(field('row_peak'), field('row')))
    end
  else
    put('row', 0)
    put('last_success_at', now)
    take(failures, number)
  end
  if outcome == 'SUCCESS' and not was_overdue then
    take(slow, number)
  elseif not was_overdue and (outcome == 'SLOW' or rules.slow_counts) then
    add(slow, number, task, each)
  end
end

local function count(runs)
  local failures = load_score('failure', FAILURES, rules.failure_take)
  local slow = load_score('slow', SLOW, rules.slow_take)
  for _, run in ipairs(runs) do
    local outcome, number, task, each, was_overdue = unpack(run)
    if outcome == 'OVERDUE' and rules.slow_counts then
      add(slow, number, task, true)
    elseif outcome ~= 'OVERDUE' and outcome ~= 'IGNORED' and number > 0 then
      sum_up(outcome, number)
      weigh(failures, slow, outcome, number, task, each, was_overdue)
    end
  end
  save_score('failure', failures)
  save_score('slow', slow)
end

load_breaker()
local is_current = ARGV[5] == state.epoch or (ARGV[5] == '0' and state.epoch == state.first)
if is_current and (state.state == 'CLOSED' or state.state == 'SHADOW') then
  count(cjson.decode(ARGV[6]))
  if ARGV[7] ~= '' then
    put('failed_checks', ARGV[7] == 'FAILURE' and field('failed_checks') + 1 or 0)
    put('check_limit', ARGV[8])
  end
end
if KEY ~= '' then
  redis.call('ZADD', CHILDREN, 'GT', integer(now), KEY)
end
save()
return answer()
