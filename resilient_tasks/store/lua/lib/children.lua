-- Children: core/children.py in Lua. Same functions, same arithmetic: change the two together.
-- A child's keys have its parent's hash tag, so that one script may touch both.
-- Needs state.lua

local IDLE_AFTER = 3600000
local PLAIN_FOR = 120000 -- ms for which a CLOSED child that nobody uses keeps its state: longer than views remember it
local HELD_OPEN = { OPEN = true, HALF_OPEN = true, FORCED_OPEN = true }
local KEY = string.match(NAME, ':(.*)') -- nil for a breaker that is no child

local function is_ramping()
  return record.ramp_since ~= nil and now - record.ramp_since < rules.ramp
end

local function is_plain()
  return record.state == 'CLOSED' and not is_ramping()
end

local function active_children()
  return redis.call('ZCOUNT', CHILDREN, '(' .. integer(now - rules.window), '+inf')
end

local function has_room_to_open()
  if not KEY or rules.max_open_ratio == 0 then
    return true
  end
  local was_active = tonumber(redis.call('ZSCORE', CHILDREN, KEY) or 0) > now - rules.window
  local active = active_children() + (was_active and 0 or 1)
  return redis.call('ZCARD', OPENED) + 1 <= rules.max_open_ratio * active
end

-- A state that says nothing any more ends by itself; what an operator has set stays.
local function expire_child()
  if is_plain() then
    redis.call('PEXPIRE', STATE, integer(math.max(2 * rules.window, PLAIN_FOR) + rules.max_open_time * record.openings))
  elseif record.state == 'OPEN' or record.state == 'HALF_OPEN' then
    redis.call('PEXPIRE', STATE, integer(math.max(0, (record.open_until or now) - now) + IDLE_AFTER))
  else
    redis.call('PERSIST', STATE)
  end
end

function save_child()
  if not KEY then
    return
  end
  if HELD_OPEN[record.state] then
    redis.call('ZADD', OPENED, 'NX', integer(now), KEY)
    redis.call('ZADD', CHILDREN, '+inf', KEY)
  else
    redis.call('ZREM', OPENED, KEY)
    redis.call('ZADD', CHILDREN, integer(now), KEY)
  end
  if not is_plain() then
    redis.call('SADD', HOT, KEY)
  end
  expire_child()
end
