-- In front of every script about a breaker: what is kept of it, its rules, and the answer that every script gives.
--
-- KEYS  1 state      hash         fields of core/rules.py's Seen and Counter, and the rules as JSON
--       2 failures   set          tasks that have added to the failure score since it was 0
--       3 slow       set          tasks that have added to the slow score since it was 0
--       4 deferred   sorted set   task id -> deferred at, ms
--       5 deadlines  sorted set   task id -> end of its wait, ms
--       6 trials     sorted set   epoch:holder of a permit -> end of its lease, ms
--       7 slots      sorted set   holder of a slot -> end of its lease, ms
--       8 children   sorted set   of the breaker or its parent: key -> last used, ms; +inf while it is held open
--       9 active     sorted set   the same: keys of children that are not plainly CLOSED -> last transition, ms
--       10 former    hash         what a release without schema numbers has kept of the breaker
-- ARGV  1 rules      JSON of core/rules.py's Rules, as the caller declares them
--       2 key        of a child; empty for a breaker that is none
--       3 channel    on which changes are published
--       4 name       of the breaker
--       5..13        the numbers among the rules that most scripts need, so that none has to decode the JSON: window,
--                    max_open_time, most_in_flight, minimum_calls, minimum_tasks, failure_take, slow_take,
--                    slow_counts as 1 or 0, revision
-- answer: JSON {now, state, trials as a flat array, live slots, deferred, oldest, earliest deadline, active children,
-- done}; all that may be large as text, with all its digits

local STATE, FAILURES, SLOW, DEFERRED, DEADLINES, TRIALS, SLOTS, CHILDREN, ACTIVE, FORMER = unpack(KEYS)
local KEY, CHANNEL, NAME = ARGV[2], ARGV[3], ARGV[4]
local LONGEST_LEASE, IDLE_AFTER = 60000, 3600000 -- ms
local TAKEN_OVER = { OPEN = true, FORCED_OPEN = true, DISABLED = true, SHADOW = true }
local now = now_ms()
local rules = setmetatable({
  window = tonumber(ARGV[5]), max_open_time = tonumber(ARGV[6]), most_in_flight = tonumber(ARGV[7]),
  minimum_calls = tonumber(ARGV[8]), minimum_tasks = tonumber(ARGV[9]), failure_take = tonumber(ARGV[10]),
  slow_take = tonumber(ARGV[11]), slow_counts = ARGV[12] == '1', revision = tonumber(ARGV[13]),
}, { __index = function(self, name)
  setmetatable(self, { __index = cjson.decode(ARGV[1]) })
  return self[name]
end })
local state, written = {}, {} -- the fields as text, and which of them are to be written

-- tostring() would round a millisecond timestamp.
local function integer(number)
  return string.format('%.0f', number)
end

local function field(name)
  return tonumber(state[name] or 0) or 0
end

local function put(name, value)
  local text = type(value) == 'number' and integer(value) or value
  if state[name] ~= text then
    state[name], written[name] = text, true
  end
end

-- A breaker that is not known yet. What an operator has set under a release without schema numbers stays set, and
-- an outage goes on; the trials of that release are not this one's, so HALF_OPEN is OPEN until now.
local function begin(epoch)
  local kept = redis.pcall('HMGET', FORMER, 'state', 'since', 'reason', 'actor', 'openings', 'open_until')
  if kept[1] == 'HALF_OPEN' then
    kept[1], kept[6] = 'OPEN', now
  end
  if not TAKEN_OVER[kept[1]] or (kept[1] == 'OPEN' and not tonumber(kept[6])) then
    kept = { 'CLOSED' }
  end
  for i, name in ipairs({ 'state', 'since', 'reason', 'actor', 'openings', 'open_until' }) do
    put(name, kept[i] or (name == 'since' and now or ''))
  end
  put('epoch', epoch)
  put('version', epoch)
  put('first', epoch)
end

-- The rules with the higher revision decide, of equal ones those declared last.
local function load_rules()
  local kept = state.rules
  if kept == ARGV[1] then
    return
  end
  local newer = kept and cjson.decode(kept)
  if newer and newer.revision > rules.revision then
    rules = setmetatable(newer, { __index = rules })
    return
  end
  put('rules', ARGV[1])
  put('row_peak', 0) -- a peak says nothing under other rules
  for _, kind in ipairs({ 'failure', 'slow' }) do
    put(kind, (string.gsub(state[kind] or '0 0 0 0 0 0', '%d+$', '0')))
  end
end

-- Epoch and version of a new breaker start from the clock, so that nothing of a store that was emptied matches.
local function load_breaker()
  local flat = redis.call('HGETALL', STATE)
  for i = 1, #flat, 2 do
    state[flat[i]] = flat[i + 1]
  end
  if not state.epoch then
    begin(now)
  end
  load_rules()
end

local function live(leases)
  return redis.call('ZCOUNT', leases, '(' .. integer(now), '+inf')
end

local function holds(leases, member)
  return tonumber(redis.call('ZSCORE', leases, member) or 0) > now
end

local function save()
  local changed = {}
  for name in pairs(written) do
    changed[#changed + 1] = name
    changed[#changed + 1] = state[name]
  end
  if #changed > 0 then
    redis.call('HSET', STATE, unpack(changed))
  end
  if KEY == '' then
    return
  elseif state.state == 'CLOSED' then -- what says nothing any more ends by itself, later than views remember it
    local longest = math.max(2 * rules.window, 120000) + rules.max_open_time * field('openings')
    redis.call('PEXPIRE', STATE, integer(longest))
  elseif state.state == 'OPEN' or state.state == 'HALF_OPEN' then
    redis.call('PEXPIRE', STATE, integer(math.max(0, field('open_until') - now) + IDLE_AFTER))
  else
    redis.call('PERSIST', STATE)
  end
end

local function answer(done, with_rules)
  local kept, deferred = state.rules, redis.call('ZCARD', DEFERRED)
  local oldest = deferred > 0 and redis.call('ZRANGE', DEFERRED, 0, 0, 'WITHSCORES') or {}
  local deadline = deferred > 0 and redis.call('ZRANGE', DEADLINES, 0, 0, 'WITHSCORES') or {}
  state.rules = (with_rules or kept ~= ARGV[1]) and kept or nil -- the caller knows its own
  local encoded = cjson.encode({
    integer(now), state, redis.call('ZRANGE', TRIALS, 0, -1, 'WITHSCORES'),
    rules.most_in_flight > 0 and live(SLOTS) or 0, deferred, oldest[2] or '', deadline[2] or '',
    KEY == '' and redis.call('ZCARD', ACTIVE) or 0, done or 0,
  })
  state.rules = kept
  return encoded
end

-- A user without rights on channels is denied this alone: every process polls as well.
local function publish()
  redis.pcall('PUBLISH', CHANNEL, NAME .. '\n' .. answer(0, true))
end
