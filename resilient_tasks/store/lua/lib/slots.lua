-- Slots: core/slots.py in Lua, and what core/record.py says of them. Same functions, same arithmetic: change the two
-- together. There may be many slots, so each is read and written by itself.
-- Needs state.lua

local CROWDED_FOR = 5000
local UNLIMITED = { DISABLED = true, SHADOW = true }

local slot_ends = {} -- as this decision has changed them: holder -> end of its lease, 0 if it is free
local live_slots -- known once somebody has asked

local function slot_end(holder)
  return slot_ends[holder] or tonumber(redis.call('ZSCORE', IN_FLIGHT, holder) or 0)
end

function in_flight()
  if rules.most_in_flight == 0 then
    return 0
  end
  live_slots = live_slots or redis.call('ZCOUNT', IN_FLIGHT, '(' .. integer(now), '+inf')
  return live_slots
end

local function set_slot(holder, lease_end)
  local before = slot_end(holder)
  if lease_end ~= before then
    live_slots = in_flight() + (lease_end > now and 1 or 0) - (before > now and 1 or 0)
    slot_ends[holder] = lease_end
  end
end

local function holds_slot(holder)
  return slot_end(holder) > now
end

function is_crowded()
  return rules.most_in_flight > 0 and record.crowded_until > now
end

local function crowd(until_ms)
  local was_crowded = is_crowded()
  record.crowded_until, dirty = until_ms, true
  return is_crowded() ~= was_crowded
end

local function size()
  if rules.least_in_flight == 0 then
    return rules.most_in_flight
  end
  return math.min(math.max(record.learned, rules.least_in_flight), rules.most_in_flight)
end

function concurrency_limit()
  if rules.most_in_flight == 0 or UNLIMITED[record.state] then
    return nil
  end
  local elapsed = record.ramp_since and math.max(0, now - record.ramp_since) or rules.ramp
  if elapsed >= rules.ramp then
    return size()
  end
  return math.max(1, math.floor(size() * ((rules.ramp + 9 * elapsed) / (10 * rules.ramp))))
end

local function offers_slot(holder, task)
  local limit = concurrency_limit()
  if not limit or holds_slot(holder) or holds_slot(task) then
    return true
  end
  local fresh = task == '' and record.state == 'CLOSED'
  return in_flight() < limit and not (fresh and is_crowded())
end

local function take_slot(holder, lease, task)
  if concurrency_limit() then
    local lease_end = math.max(slot_end(holder), now + lease)
    set_slot(task, 0)
    set_slot(holder, lease_end)
  end
end

-- Keep slots for the first of the waiting tasks, and return for how many; more of them make a crowd.
local function keep_for(tasks, lease, limit)
  local kept = math.max(0, math.min(#tasks, limit - in_flight()))
  for i = 1, kept do
    set_slot(tasks[i], now + lease)
  end
  return kept, crowd(kept < #tasks and now + CROWDED_FOR or 0)
end

local function shrunk(limit, count)
  while count > 0 and limit > rules.least_in_flight do
    limit, count = math.max(rules.least_in_flight, math.floor(limit * 9 / 10)), count - 1
  end
  return limit
end

local function grow(limit, count)
  if record.backed_off == 0 then
    record.learned = math.min(limit + count, rules.most_in_flight)
    return
  end
  record.credit = record.credit + count
  while record.credit >= limit and limit < rules.most_in_flight do
    record.credit = record.credit - limit
    limit = limit + 1
  end
  record.learned, record.credit = limit, math.min(record.credit, limit)
end

-- Adapt the limit to equal outcomes of calls.
local function learn(outcome, count)
  if rules.least_in_flight == 0 then
    return
  end
  if outcome ~= 'SUCCESS' then
    record.learned, record.backed_off, record.credit = shrunk(size(), count), 1, 0
  elseif 2 * in_flight() >= size() then
    grow(size(), count)
  end
  dirty = true
end

function save_slots()
  for holder, lease_end in pairs(slot_ends) do
    if lease_end > 0 then
      redis.call('ZADD', IN_FLIGHT, integer(lease_end), holder)
    else
      redis.call('ZREM', IN_FLIGHT, holder)
    end
  end
  if next(slot_ends) then
    redis.call('ZREMRANGEBYSCORE', IN_FLIGHT, '-inf', integer(now))
  end
end
