-- get() -> array {value, age in ms}, or nothing when there is no value or it has ended
-- KEYS  1 entry   hash   value, at (ms), until (ms)

local now = now_ms()
local entry = redis.call('HMGET', KEYS[1], 'value', 'at', 'until')
if entry[1] and now < tonumber(entry[3]) then
  return { entry[1], now - tonumber(entry[2]) }
end
return false
