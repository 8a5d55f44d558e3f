-- What the store remembers of a breaker's past: its log, counts, and outages. It decides nothing.
--
-- KEYS  8 log       list         transitions, and what was done by hand, as JSON, the newest first
--       9 minutes   hash         slot -> JSON {minute, counts: {kind: count}}
--       10 totals   hash         kind -> count since ever, for a child since it was last idle for a day; and speed (of
--                                resuming, thousandths of a task per second), speed_at and speed_since (ms)
--       11 outage   hash         the latest one: opened, closed, drained (ms), reason, actor, openings, kind -> count
--       12 outages  list         former outages as JSON, the newest first
-- An outage lasts from the refusal of calls until they are admitted and no task waits any more.

local DEFERRED, LOG, MINUTES, TOTALS, OUTAGE, OUTAGES = KEYS[4], KEYS[8], KEYS[9], KEYS[10], KEYS[11], KEYS[12]
local MINUTE, DAY = 60000, 86400000 -- ms
local IS_CHILD = string.sub(KEYS[1], 1, -6) ~= string.sub(KEYS[13], 1, -9) -- ...state and ...children
local MOST_LOGGED, MOST_OUTAGES, MINUTES_KEPT = IS_CHILD and 50 or 200, IS_CHILD and 20 or 100, IS_CHILD and 60 or 120
local MOST_KINDS = 40
local LONG_AGO = IS_CHILD and DAY or 90 * DAY -- ms after which what nobody has added to is gone
local LATELY = 10000 -- ms; what was resumed so long ago counts a third of what is resumed now
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

-- A moving average, begun anew with each outage that ends and after each pause.
local function save_speed()
  local resumed = (tallied.resumed or 0) - (tallied.deferred_again or 0)
  if resumed == 0 then
    return
  end
  local speed, at, since = unpack(redis.call('HMGET', TOTALS, 'speed', 'speed_at', 'speed_since'))
  if not since or now - tonumber(at) > MINUTE then
    speed, at, since = 0, now, integer(now)
  end
  local left = tonumber(speed) * math.exp((tonumber(at) - now) / LATELY)
  local present = integer(math.max(0, left + resumed * 1000000 / LATELY))
  redis.call('HSET', TOTALS, 'speed', present, 'speed_at', integer(now), 'speed_since', since)
end

local function is_under_way(late)
  local opened, drained = unpack(redis.call('HMGET', OUTAGE, 'opened', 'drained'))
  return opened and (not drained or now - tonumber(drained) < late)
end

local function count_in_outage(counts)
  for kind, count in pairs(counts) do
    if count > 0 then
      local as = bounded(kind, redis.call('HEXISTS', OUTAGE, kind) == 1, redis.call('HLEN', OUTAGE))
      redis.call('HINCRBY', OUTAGE, as, integer(count))
    end
  end
  redis.call('PEXPIRE', OUTAGE, LONG_AGO)
end

local function save_tallies(late)
  if next(tallied) then
    save_minute()
    save_speed()
    save_totals()
    if is_under_way(late) then
      count_in_outage(tallied)
    end
  end
end

-- What the latest failures of the window were, in all as many as there are; minutes are as exact as it gets.
local function latest_causes(failures, window)
  local counts, total, minute = {}, 0, math.floor(now / MINUTE)
  for back = 0, math.min(math.ceil(window / MINUTE), MINUTES_KEPT - 1) do
    for kind, count in pairs(total < failures and load_minute(minute - back).counts or {}) do
      if string.sub(kind, 1, 6) == 'cause:' then
        counts[kind] = (counts[kind] or 0) + count
        total = total + count
      end
    end
  end
  local causes, share, seen = {}, math.min(1, failures / math.max(total, 1)), 0
  for kind, count in pairs(counts) do
    causes[kind] = math.floor((seen + count) * share + 0.5) - math.floor(seen * share + 0.5)
    seen = seen + count
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
  local failures = transition.failures + late
  count_in_outage({ FAILURE = failures, SLOW = transition.slow })
  count_in_outage(latest_causes(failures, window))
end

local function mark_drained()
  if redis.call('ZCARD', DEFERRED) == 0 and redis.call('HEXISTS', OUTAGE, 'closed') == 1 and is_under_way(LATE) then
    redis.call('HSET', OUTAGE, 'drained', integer(now))
  end
end

-- Calls are admitted, whatever has become of the state in which they were not.
local function close_outage()
  if redis.call('HEXISTS', OUTAGE, 'opened') == 1 and redis.call('HEXISTS', OUTAGE, 'closed') == 0 then
    redis.call('HSET', OUTAGE, 'closed', integer(now))
    redis.call('HDEL', TOTALS, 'speed_since')
    mark_drained()
  end
end

local function begins(transition)
  return ADMITTING[transition.previous] and not ADMITTING[transition.state]
end

local function follow(transition, window, late)
  if begins(transition) then
    begin_outage(transition, window, late)
  elseif ADMITTING[transition.state] and not ADMITTING[transition.previous] then
    close_outage()
  elseif transition.state == 'OPEN' and redis.call('HEXISTS', OUTAGE, 'opened') == 1 then
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
  save_tallies(transition and begins(transition) and 0 or LATE)
  if transition then
    log(transition)
    follow(transition, window, late)
  end
end
