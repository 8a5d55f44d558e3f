-- What a breaker in SHADOW would have done: core/shadow.py in Lua; change the two together.
-- An opening is {at, until, calls, in a row}; state.lua reads them.
-- Needs state.lua

local MOST_OPENINGS = 20

local function next_in_a_row(opening)
  return 1 + math.max(0, opening[4] - math.floor(math.max(0, now - opening[2]) / rules.max_open_time))
end

local function add_shadow_opening(retry_after)
  local openings = shadow_openings()
  local last = openings[#openings]
  local row = last and next_in_a_row(last) or 1
  openings[#openings + 1] = { now, now + open_for(row, retry_after), 0, row }
  if #openings > MOST_OPENINGS then
    table.remove(openings, 1)
  end
  record.shadow, record.would_open = cjson.encode(openings), 1
end

local function add_shadow_calls(count)
  local openings = shadow_openings()
  openings[#openings][3] = openings[#openings][3] + count
  record.shadow = cjson.encode(openings)
end
