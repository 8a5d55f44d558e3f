-- What the store remembers of a breaker's past: its log, counts, and outages. It decides nothing.
-- Put after now.lua in front of every script that writes it; what decides has state.lua and rules.lua behind it.
--
-- KEYS  8 log       list         transitions, and what was done by hand, as JSON, the newest first
--       9 minutes   hash         slot -> JSON {minute, counts: {kind: count}}
--       10 totals   hash         kind -> count since ever, for a child since it was last idle for a day
--       11 outage   hash         the latest one: opened, closed, drained (ms), reason, actor, openings, kind -> count
--       12 outages  list         former outages as JSON, the newest first
-- An outage lasts from the refusal of calls until they are admitted and no task waits any more.

local DEFERRED, LOG, MINUTES, TOTALS, OUTAGE, OUTAGES = KEYS[4], KEYS[8], KEYS[9], KEYS[10], KEYS[11], KEYS[12]
local MOST_LOGGED, MOST_OUTAGES, MINUTES_KEPT, MOST_KINDS = 200, 100, 120, 40
local MINUTE, DAY = 60000, 86400000 -- ms
local IS_CHILD = string.sub(KEYS[1], 1, -6) ~= string.sub(KEYS[13], 1, -9) -- ...state and ...children
local LONG_AGO = IS_CHILD and DAY or 90 * DAY -- ms after which what nobody has added to is gone
local LATE = 5000 -- ms; what is told so late still belongs to an outage that has ended
local ADMITTING = { CLOSED = true, SHADOW = true, DISABLED = true }

local now = now_ms()
local tallied = {} -- kind -> count, to be saved

-- tostring() would round a millisecond timestamp.
local function integer(number)
  return string.format('%.0f', number)
end

local function tally(kind, count)
  if count > 0 then
    tallied[kind] = (tallied[kind] or 0) + count
  end
end

local function tally_all(prefix, counts)
  for kind, count in pairs(counts or {}) do
    tally(prefix .. kind, count)
  end
end

-- One name too many is counted as 'other': names come from other people's code.
local function bounded(kind, known, kinds)
  local prefix = string.match(kind, '^%l+:')
  if not prefix or known or kinds < MOST_KINDS then
    return kind
  end
  return prefix .. 'other'
end

local SAYS_NOTHING = { IGNORED = true, OVERDUE = true } -- what is overdue will be told again when it has ended

-- Return how many of these calls have failed.
local function tally_calls(evidence)
  local failures = 0
  for _, run in ipairs(evidence.runs) do
    local outcome, count = run[1], run[2]
    if not SAYS_NOTHING[outcome] then
      tally(outcome, count)
      failures = failures + (outcome == 'FAILURE' and count or 0)
    end
  end
  tally_all('cause:', evidence.causes)
  return failures
end

local function tally_call(outcome, cause)
  tally_calls({ runs = { { outcome, 1 } }, causes = outcome == 'FAILURE' and { [cause] = 1 } })
end

local function tally_trial(outcome, cause)
  if not SAYS_NOTHING[outcome] then
    tally('trials', 1)
  end
  tally_call(outcome, cause)
end

local function load_minute(minute)
  local stored = redis.call('HGET', MINUTES, integer(minute % MINUTES_KEPT))
  local kept = stored and cjson.decode(stored)
  return kept and kept.minute == minute and kept or { minute = minute, counts = {} }
end

local function save_minute()
  local kept, kinds = load_minute(math.floor(now / MINUTE)), 0
  for _ in pairs(kept.counts) do
    kinds = kinds + 1
  end
  for kind, count in pairs(tallied) do
    local as = bounded(kind, kept.counts[kind], kinds)
    kinds = kinds + (kept.counts[as] and 0 or 1)
    kept.counts[as] = (kept.counts[as] or 0) + count
  end
  redis.call('HSET', MINUTES, integer(kept.minute % MINUTES_KEPT), cjson.encode(kept))
  redis.call('PEXPIRE', MINUTES, MINUTES_KEPT * MINUTE)
end

-- Causes are kept for outages and recent minutes only.
local function save_totals()
  for kind, count in pairs(tallied) do
    if string.sub(kind, 1, 6) ~= 'cause:' then
      redis.call('HINCRBY', TOTALS, kind, integer(count))
    end
  end
  redis.call('PEXPIRE', TOTALS, LONG_AGO)
end

local function is_under_way()
  local opened, drained = unpack(redis.call('HMGET', OUTAGE, 'opened', 'drained'))
  return opened and (not drained or now - tonumber(drained) < LATE)
end

local function count_in_outage(counts)
  for kind, count in pairs(counts) do
    local as = bounded(kind, redis.call('HEXISTS', OUTAGE, kind) == 1, redis.call('HLEN', OUTAGE))
    redis.call('HINCRBY', OUTAGE, as, integer(count))
  end
  redis.call('PEXPIRE', OUTAGE, LONG_AGO)
end

local function save_tallies()
  if next(tallied) then
    save_minute()
    save_totals()
    if is_under_way() then
      count_in_outage(tallied)
    end
  end
end

-- What the failures of the last so many ms were; minutes are as exact as it gets.
local function recent_causes(span)
  local causes, minute = {}, math.floor(now / MINUTE)
  for back = 0, math.min(math.ceil(span / MINUTE), MINUTES_KEPT - 1) do
    for kind, count in pairs(load_minute(minute - back).counts) do
      if string.sub(kind, 1, 6) == 'cause:' then
        causes[kind] = (causes[kind] or 0) + count
      end
    end
  end
  return causes
end

local function file_outage(flat)
  local ended = {}
  for i = 1, #flat, 2 do
    ended[flat[i]] = flat[i + 1]
  end
  redis.call('LPUSH', OUTAGES, cjson.encode(ended))
  redis.call('LTRIM', OUTAGES, 0, MOST_OUTAGES - 1)
  redis.call('PEXPIRE', OUTAGES, LONG_AGO)
  redis.call('DEL', OUTAGE)
end

-- late: failures of this very script that came after the trip
local function begin_outage(transition, window, late)
  local opened, drained = unpack(redis.call('HMGET', OUTAGE, 'opened', 'drained'))
  if opened and not drained then -- its tasks still wait
    redis.call('HDEL', OUTAGE, 'closed')
    redis.call('HINCRBY', OUTAGE, 'openings', 1)
    return
  elseif opened then
    file_outage(redis.call('HGETALL', OUTAGE))
  end
  redis.call(
    'HSET', OUTAGE, 'opened', integer(now), 'reason', transition.reason, 'actor', transition.actor, 'openings', 1
  )
  count_in_outage({ FAILURE = transition.failures + late, SLOW = transition.slow })
  count_in_outage(recent_causes(window))
end

local function mark_drained()
  if redis.call('ZCARD', DEFERRED) == 0 and redis.call('HEXISTS', OUTAGE, 'closed') == 1 and is_under_way() then
    redis.call('HSET', OUTAGE, 'drained', integer(now))
  end
end

local function follow(transition, window, late)
  local was, is = ADMITTING[transition.previous], ADMITTING[transition.state]
  if was and not is then
    begin_outage(transition, window, late)
  elseif is and not was then
    redis.call('HSET', OUTAGE, 'closed', integer(now))
    mark_drained()
  elseif transition.state == 'OPEN' then
    redis.call('HINCRBY', OUTAGE, 'openings', 1)
  end
  redis.call('PEXPIRE', OUTAGE, LONG_AGO)
end

local function log(entry)
  redis.call('LPUSH', LOG, cjson.encode(entry))
  redis.call('LTRIM', LOG, 0, MOST_LOGGED - 1)
  redis.call('PEXPIRE', LOG, LONG_AGO)
end

local function save_history(transition, window, late)
  if transition and transition.state ~= transition.previous then -- in SHADOW nothing is entered
    tally('entered:' .. transition.state, 1)
  end
  save_tallies()
  if transition then
    log(transition)
    follow(transition, window, late)
  end
end
