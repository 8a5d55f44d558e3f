-- count(epoch, minimum_tasks, calls, failed, slow, score, number, amount, task, each, ...) -> answer; see breaker.lua
-- Count calls that were admitted in the present epoch: into the evidence, and into the sums for people. The answer has
-- peaks of the evidence, too (peak_failure, peak_slow, peak_row): the calls may have ended with successes.
-- KEYS, ARGV 1..7: see breaker.lua
-- ARGV  8 epoch           in which the calls were admitted; 0: before the store knew the breaker
--       9 minimum_tasks   that open the breaker
--       10 calls          that have ended
--       11 failed         ones among them
--       12 slow           ones among them
--       13.. weights      core/rules.py's Weight, oldest first, each five: failure or slow, the number of calls, what
--                         each adds to that score (below 0: takes from it), their task, and each as 1 or ''
-- Needs breaker.lua

local UNIT, MOST_TASKS, BUCKETS = 1000000, 1000, 5
local MINIMUM_TASKS, CALLS, FAILED = tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])

local function clear(score)
  score.value, score.tasks, score.calls, score.bad, score.is_changed = 0, 0, 0, 0, true
  redis.call('DEL', score.key)
end

-- core/rules.py's Score
local function load_score(kind, key)
  local value, tasks, calls, bad, at = string.match(state[kind] or '0 0 0 0 0', '(%d+) (%d+) (%d+) (%d+) (%d+)')
  local score = {
    key = key, value = tonumber(value), tasks = tonumber(tasks), calls = tonumber(calls), bad = tonumber(bad),
    at = tonumber(at), peak = 0,
  }
  if score.tasks > 0 and math.abs(now - score.at) >= WINDOW then
    clear(score)
  end
  return score
end

-- Return how many bad calls a run is worth. Whole runs of a task add once while the score is above 0.
local function add(score, number, task, each)
  local new = number
  if task ~= '' then
    local is_full = score.tasks >= MOST_TASKS
    new = is_full and 1 - redis.call('SISMEMBER', score.key, task) or redis.call('SADD', score.key, task)
    number = each ~= '' and number or new
  end
  score.tasks = score.tasks + new
  if number > 0 then
    score.bad, score.at = score.bad + number, now
    redis.call('PEXPIRE', score.key, integer(WINDOW + 60000))
  end
  return number
end

local function weigh(score, number, amount, task, each)
  if amount > 0 then
    number = add(score, number, task, each)
  elseif score.value == 0 then
    return 0
  end
  score.calls, score.is_changed = score.calls + number, true
  score.value = math.max(0, score.value + number * amount)
  if score.tasks >= MINIMUM_TASKS then
    score.peak = math.max(score.peak, score.value)
  end
  if score.value == 0 then
    clear(score)
  end
  return number
end

local function count()
  local scores = { failure = load_score('failure', FAILURES), slow = load_score('slow', SLOW) }
  local row, row_peak = field('row'), 0
  for i = 13, #ARGV, 5 do
    local score, amount = scores[ARGV[i]], tonumber(ARGV[i + 2])
    local number = weigh(score, tonumber(ARGV[i + 1]), amount, ARGV[i + 3], ARGV[i + 4])
    if score == scores.failure then
      row = amount > 0 and row + number or 0
      row_peak = score.tasks >= MINIMUM_TASKS and math.max(row_peak, row) or row_peak
    end
  end
  put('row', row)
  state.peak_row = row_peak > 0 and integer(row_peak) or nil
  for kind, s in pairs(scores) do
    if s.is_changed then
      put(kind, string.format('%.0f %.0f %.0f %.0f %.0f 0', s.value, s.tasks, s.calls, s.bad, s.at))
      state['peak_' .. kind] = integer(s.peak)
    end
  end
end

-- Add to the sums for people.
local function sum_up()
  local index = math.floor(now / math.ceil(WINDOW / (BUCKETS - 1)))
  local bucket = 'bucket_' .. index % BUCKETS
  local at, calls, failed, slow = string.match(state[bucket] or '', '^(%d+) (%d+) (%d+) (%d+)$')
  if tonumber(at) ~= index then
    calls, failed, slow = 0, 0, 0
  end
  put(bucket, string.format('%.0f %.0f %.0f %.0f', index, calls + CALLS, failed + FAILED, slow + ARGV[12]))
  if FAILED > 0 then
    put('total_failures', field('total_failures') + FAILED)
  end
  if CALLS > FAILED then
    put('last_success_at', now)
  end
end

if not load_breaker() then
  return answer(-1)
end
local is_current = ARGV[8] == state.epoch or (ARGV[8] == '0' and state.epoch == state.first)
if is_current and (state.state == 'CLOSED' or state.state == 'SHADOW') then
  count()
  if CALLS > 0 then
    sum_up()
  end
end
if KEY ~= '' then
  redis.call('ZADD', CHILDREN, 'GT', integer(now), KEY)
end
save()
return answer()
