-- The sliding window: core/window.py in Lua. Same functions, same arithmetic: change the two together.
-- Needs state.lua

local BUCKETS, SLOTS = 10, 11
local MOST_VOTERS, VOTE_LENGTH = 100, 10
local BUCKET = '(%d+) (%d+) (%d+) (%d+) (%d+) (%d+) (%d+)(.*)'

function load_window()
  local loaded = {}
  for slot, text in pairs(load_hash(WINDOW)) do
    local index, calls, failures, slow, latest, proxied, tasks, votes = string.match(text, BUCKET)
    loaded[tonumber(slot)] = {
      index = tonumber(index), calls = tonumber(calls), failures = tonumber(failures), slow = tonumber(slow),
      latest = tonumber(latest), proxied = tonumber(proxied), tasks = tonumber(tasks), votes = votes,
    }
  end
  return loaded
end

local function no_sums()
  return { calls = 0, failures = 0, slow = 0, proxied = 0, tasks = 0 }
end

local function plus(sums, run, count)
  local failed = run.outcome == 'FAILURE' and count or 0
  local slow = (run.outcome == 'SLOW' or run.outcome == 'OVERDUE') and count or 0
  return {
    calls = sums.calls + count, failures = sums.failures + failed, slow = sums.slow + slow,
    proxied = sums.proxied + (run.proxied and failed or 0),
    tasks = sums.tasks + (run.voter == '' and failed + slow or 0),
  }
end

-- The bucket of this moment, and its slot.
local function current_bucket()
  local index = math.floor(now / math.ceil(rules.window / BUCKETS))
  local slot = index % SLOTS
  local bucket = window[slot]
  if not bucket or bucket.index ~= index then
    bucket = no_sums()
    bucket.index, bucket.latest, bucket.votes = index, now, ''
    window[slot] = bucket
  end
  touched[slot] = true
  return bucket, slot
end

local function window_add(run, count)
  local bucket, slot = current_bucket()
  local more = plus(bucket, run, count)
  more.index, more.latest, more.votes = bucket.index, now, bucket.votes
  window[slot] = more
end

local function is_live(bucket)
  return now - rules.window < bucket.latest and bucket.latest <= now + rules.window
end

local function initial(outcome)
  return string.sub(outcome, 1, 1)
end

-- The slot that remembers how a task has voted last, and the initial of that outcome; nil if none does.
local function vote_of(voter)
  local found, outcome
  for slot, bucket in pairs(window) do
    local at = is_live(bucket) and string.find(bucket.votes, ' ' .. voter, 1, true)
    if at and not (found and window[found].index > bucket.index) then
      found, outcome = slot, string.sub(bucket.votes, at + VOTE_LENGTH - 1, at + VOTE_LENGTH - 1)
    end
  end
  return found, outcome
end

local function change_vote(slot, voter, outcome)
  local bucket = window[slot]
  bucket.votes = string.gsub(bucket.votes, ' ' .. voter .. '%u', ' ' .. voter .. initial(outcome))
  touched[slot], dirty = true, true
end

-- Remember how a task votes with calls that are about to be counted.
local function remember_vote(run)
  local bucket, slot = current_bucket()
  if string.find(bucket.votes, ' ' .. run.voter, 1, true) then
    change_vote(slot, run.voter, run.outcome)
  elseif #bucket.votes < MOST_VOTERS * VOTE_LENGTH then
    bucket.votes = bucket.votes .. ' ' .. run.voter .. initial(run.outcome)
  end
end

-- A call that was slow has failed in the end.
local function vote_becomes_failure(slot, run)
  local bucket = window[slot]
  bucket.failures, bucket.slow = bucket.failures + 1, bucket.slow - 1
  bucket.proxied = bucket.proxied + (run.proxied and 1 or 0)
  change_vote(slot, run.voter, 'FAILURE')
end

function window_totals()
  local sums = no_sums()
  for _, bucket in pairs(window) do
    if is_live(bucket) then
      for part, sum in pairs(sums) do
        sums[part] = sum + bucket[part]
      end
    end
  end
  return sums
end

function save_window()
  for slot in pairs(touched) do
    local b = window[slot]
    local sums = { b.index, b.calls, b.failures, b.slow, b.latest, b.proxied, b.tasks }
    local text = string.format('%.0f %.0f %.0f %.0f %.0f %.0f %.0f', unpack(sums)) .. b.votes
    redis.call('HSET', WINDOW, integer(slot), text)
    redis.call('PEXPIRE', WINDOW, integer(2 * rules.window + 60000)) -- a short one must outlive a slow server
  end
end
