-- In front of every script about a breaker: what is kept of it, and the answer that every script gives.
--
-- KEYS  1 state      hash         fields of core/rules.py's Seen and Kept, and the rules as JSON
--       2 failures   set          tasks that have added to the failure score since it was 0
--       3 slow       set          tasks that have added to the slow score since it was 0
--       4 deferred   sorted set   task id -> deferred at, ms
--       5 deadlines  sorted set   task id -> end of its wait, ms
--       6 trials     sorted set   epoch:holder of a permit -> end of its lease, ms
--       7 slots      sorted set   holder of a slot -> end of its lease, ms
--       8 children   sorted set   of the breaker or its parent: key -> last used, ms; +inf while it is held open
--       9 active     sorted set   the same: keys of children that are not plainly CLOSED -> last transition, ms
--       10 former    hash         what a release without schema numbers has kept of the breaker
-- ARGV  1 rules      JSON of core/rules.py's Rules; scripts get the numbers that they need
--       2 key        of a child; empty for a breaker that is none
--       3 channel    on which changes are published
--       4 name       of the breaker
--       5 revision, 6 window, 7 max_open_time   of the rules, ms
-- answer: JSON {now, state, trials as a flat array, live slots, deferred, oldest, earliest deadline, active children,
-- done}; all that may be large as text, with all its digits. done is -1 if the rules are out of date: nothing was done,
-- and the caller tries again with those in the answer.

local STATE, FAILURES, SLOW, DEFERRED, DEADLINES, TRIALS, SLOTS, CHILDREN, ACTIVE, FORMER = unpack(KEYS)
local RULES, KEY, CHANNEL, NAME = unpack(ARGV, 1, 4)
local REVISION, WINDOW, MAX_OPEN_TIME = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local LONGEST_LEASE, IDLE_AFTER = 60000, 3600000 -- ms
local TAKEN_OVER = { OPEN = true, FORCED_OPEN = true, DISABLED = true, SHADOW = true }
local now = now_ms()
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

-- Return whether the caller's rules are in force: those with the highest revision, of equal ones those declared last.
-- Epoch and version of a new breaker start from the clock, so that nothing of a store that was emptied matches.
local function load_breaker()
  local flat = redis.call('HGETALL', STATE)
  for i = 1, #flat, 2 do
    state[flat[i]] = flat[i + 1]
  end
  if not state.epoch then
    begin(now)
  elseif state.rules == RULES then
    return true
  elseif tonumber(string.match(state.rules or '', '"revision": (-?%d+)') or REVISION) > REVISION then
    return false
  end
  put('rules', RULES)
  return true
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
    redis.call('PEXPIRE', STATE, integer(math.max(2 * WINDOW, 120000) + MAX_OPEN_TIME * field('openings')))
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
  state.rules = (with_rules or kept ~= RULES) and kept or nil -- the caller knows its own
  local encoded = cjson.encode({
    integer(now), state, redis.call('ZRANGE', TRIALS, 0, -1, 'WITHSCORES'), live(SLOTS), deferred,
    oldest[2] or '', deadline[2] or '', KEY == '' and redis.call('ZCARD', ACTIVE) or 0, done or 0,
  })
  state.rules = kept
  return encoded
end

-- A user without rights on channels is denied this alone: every process polls as well.
local function publish()
  redis.pcall('PUBLISH', CHANNEL, NAME .. '\n' .. answer(0, true))
end
