-- now_ms() -> the time in integer milliseconds, on the one clock of the fleet: the server's.
-- Put in front of every script. Tests put another one there, so that they can advance the time.

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
