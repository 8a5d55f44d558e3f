-- What the store keeps of one breaker: loading, the figures, the answer, saving.
-- core/record.py in Lua: same functions, same arithmetic; change the two together.
-- In front of every script that decides about a breaker; window.lua, slots.lua and children.lua complete it.
--
-- KEYS  1 state      hash         fields of core/record.py's Record, and the newest policy as JSON
--       2 window     hash         slot -> "index calls failures slow latest proxied tasks" of one bucket, and votes:
--                                 " ", the voter's eight characters, and the initial of its outcome
--       3 trials     sorted set   holder of a permit -> end of its lease, ms
--       4 deferred   sorted set   task id -> deferred at, ms
--       5 deadlines  sorted set   task id -> end of its wait, ms
--       6 stragglers sorted set   like trials, of trials that outlived their HALF_OPEN
--       7 slots      sorted set   holder of a slot, or the task it is kept for -> end of its lease, ms
--       of this breaker if it may have children, of its parent if it is one:
--       8 children   sorted set   key -> when the child was last used, ms; +inf while it is held open
--       9 opened      sorted set   key -> since when the child is held open, ms
--       10 hot       set          keys of children that are not plainly CLOSED
-- ARGV  1 name       of the breaker
--       2 channel    on which changes are published
--       3 rules      JSON of core/record.py's Rules, as this caller declares them
--       4 jitter     0.0 to 1.0
--
-- A script that fails keeps what it wrote before: all reading comes first, save() writes last.

local IS_CHILD = string.sub(KEYS[1], 1, -6) ~= string.sub(KEYS[8], 1, -9) -- ...state and ...children
local ADMITTING = { CLOSED = true, SHADOW = true, DISABLED = true }
local now = now_ms()
local STATE, WINDOW, TRIALS, DEFERRED, DEADLINES, STRAGGLERS, IN_FLIGHT = unpack(KEYS)
local CHILDREN, OPENED, HOT = KEYS[8], KEYS[9], KEYS[10]
local NAME, CHANNEL, JITTER = ARGV[1], ARGV[2], tonumber(ARGV[4])
local COUNTING = { CLOSED = true, SHADOW = true }
local MOST_GROWTH_STEPS = 1000
local TEXTS = { 'state', 'reason', 'actor', 'shadow' }
local NUMBERS = {
  'epoch', 'first_epoch', 'version', 'since', 'openings', 'open_until', 'frozen_calls', 'frozen_failures',
  'frozen_slow', 'frozen_proxied', 'row', 'trial_successes', 'trial_failures', 'last_success_at', 'total_failures',
  'ramp_since', 'would_open', 'failed_checks', 'checked_at', 'crowded_until', 'learned', 'credit', 'backed_off',
}

-- tostring() would round a millisecond timestamp.
local function integer(number)
  return string.format('%.0f', number)
end

local record, rules, window, trials, stragglers -- loaded below
local transition -- what the caller is told, at most one
local changed = false -- the version has grown: others should hear of it
local dirty = false -- the state has to be written
local touched = {} -- slots of the window that have to be written
local cleared = false -- window and trials start empty
local left = false -- the stragglers have to be written
local load_window, window_totals, save_window -- in window.lua
local in_flight, concurrency_limit, is_crowded, save_slots -- in slots.lua
local save_child -- in children.lua

-- reading ---------------------------------------------------------------------------------------

local function load_hash(key)
  local flat, hash = redis.call('HGETALL', key), {}
  for i = 1, #flat, 2 do
    hash[flat[i]] = flat[i + 1]
  end
  return hash
end

-- Epoch and version start from the clock: see Record.created. Epoch 0 is for a look at an unknown breaker.
local function new_record(epoch)
  return {
    state = 'CLOSED', reason = '', actor = '', shadow = '', epoch = epoch, first_epoch = epoch, version = epoch,
    since = now, openings = 0, frozen_calls = 0, frozen_failures = 0, frozen_slow = 0, frozen_proxied = 0, row = 0,
    trial_successes = 0, trial_failures = 0, total_failures = 0, would_open = 0, failed_checks = 0,
    crowded_until = 0, learned = 0, credit = 0, backed_off = 0,
  }
end

-- What it lacks, because an older release has saved it, is as in a new one.
local function load_record()
  local stored, loaded = load_hash(STATE), new_record(0)
  for _, field in ipairs(TEXTS) do
    loaded[field] = stored[field] or loaded[field]
  end
  for _, field in ipairs(NUMBERS) do
    if stored[field] then
      loaded[field] = tonumber(stored[field])
    end
  end
  loaded.policy = stored.policy
  return stored.state and loaded
end

-- The rules with the higher revision, of equal ones those declared last; what stored ones lack, the caller's have.
local function newest_rules()
  local declared = cjson.decode(ARGV[3])
  if record.policy and record.policy ~= ARGV[3] then
    local stored = cjson.decode(record.policy)
    if stored.revision > declared.revision then
      return setmetatable(stored, { __index = declared })
    end
  end
  dirty = dirty or record.policy ~= ARGV[3]
  record.policy = ARGV[3]
  return declared
end

local function load_permits(key)
  local flat, loaded = redis.call('ZRANGE', key, 0, -1, 'WITHSCORES'), {}
  for i = 1, #flat, 2 do
    loaded[flat[i]] = tonumber(flat[i + 1])
  end
  return loaded
end

-- creates: an unknown breaker comes into being (a decision), or is only looked at (a read).
local function load_breaker(creates)
  record = load_record()
  if not record then
    record = new_record(creates and now or 0)
    dirty = true
  end
  rules = newest_rules()
  window = COUNTING[record.state] and load_window() or {}
  trials = record.state == 'HALF_OPEN' and load_permits(TRIALS) or {}
  stragglers = load_permits(STRAGGLERS)
end

-- figures -----------------------------------------------------------------------------------------

local function open_for(openings, retry_after)
  local own = rules.open_time
  for _ = 1, math.min(openings - 1, MOST_GROWTH_STEPS) do
    own = own * rules.open_growth
    if own >= rules.max_open_time then
      break
    end
  end
  local length = math.max(math.min(own, rules.max_open_time), math.min(retry_after or 0, rules.max_open_time))
  return math.floor(length * (1 + rules.open_jitter * JITTER) + 0.5)
end

local function figures()
  if COUNTING[record.state] then
    return window_totals()
  end
  return {
    calls = record.frozen_calls, failures = record.frozen_failures, slow = record.frozen_slow,
    proxied = record.frozen_proxied, tasks = 0,
  }
end

local function openings_left()
  if record.state ~= 'CLOSED' then
    return record.openings
  end
  return math.max(0, record.openings - math.floor(math.max(0, now - record.since) / rules.max_open_time))
end

local function live_trials()
  local live = 0
  for _, permits in ipairs({ trials, stragglers }) do
    for _, lease_end in pairs(permits) do
      live = live + (lease_end > now and 1 or 0)
    end
  end
  return live
end

local function shadow_openings()
  return record.shadow == '' and {} or cjson.decode(record.shadow)
end

local function snapshot()
  local sums, openings = figures(), shadow_openings()
  local oldest = redis.call('ZRANGE', DEFERRED, 0, 0, 'WITHSCORES')
  local deadline = redis.call('ZRANGE', DEADLINES, 0, 0, 'WITHSCORES')
  return {
    name = NAME, state = record.state, epoch = record.epoch, version = record.version, now = now,
    since = record.since, reason = record.reason, actor = record.actor, calls = sums.calls,
    failures = sums.failures, slow = sums.slow, local_failures = sums.proxied, openings = openings_left(),
    open_until = record.open_until,
    trials = live_trials(), last_success_at = record.last_success_at, total_failures = record.total_failures,
    ramp_since = record.ramp_since, shadow_openings = openings,
    would_open = record.would_open == 1 and now < openings[#openings][2],
    failed_checks = record.failed_checks, checked_at = record.checked_at, in_flight = in_flight(),
    concurrency_limit = concurrency_limit(), crowded = is_crowded(),
    deferred = redis.call('ZCARD', DEFERRED), oldest_deferred_at = tonumber(oldest[2]),
    next_deadline_at = tonumber(deadline[2]),
  }
end

-- writing ---------------------------------------------------------------------------------------------

local function save_record()
  local fields = { 'policy', record.policy }
  for _, field in ipairs(TEXTS) do
    fields[#fields + 1] = field
    fields[#fields + 1] = record[field]
  end
  for _, field in ipairs(NUMBERS) do
    fields[#fields + 1] = field
    fields[#fields + 1] = record[field] and integer(record[field]) or ''
  end
  redis.call('HSET', STATE, unpack(fields))
end

local function save_permits(key, permits)
  redis.call('DEL', key)
  for holder, lease_end in pairs(permits) do
    redis.call('ZADD', key, integer(lease_end), holder)
  end
end

local function save()
  save_slots()
  if not dirty then
    return
  end
  save_record()
  if cleared then
    redis.call('DEL', WINDOW, TRIALS)
  end
  save_window()
  if record.state == 'HALF_OPEN' then
    save_permits(TRIALS, trials)
  end
  if left then
    save_permits(STRAGGLERS, stragglers)
  end
  save_child()
end

-- Write, publish, and return JSON: the snapshot, the transition if this caller made one, and `more`.
local function answer(more)
  local reply = more or {}
  reply.snapshot, reply.transition = snapshot(), transition
  save()
  if changed then
    redis.call('PUBLISH', CHANNEL, cjson.encode(reply.snapshot))
  end
  return cjson.encode(reply)
end
