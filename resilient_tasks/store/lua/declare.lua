-- declare(name, ...) -> nothing
-- Note that a living worker defines these breakers.
-- KEYS  1 breakers   sorted set   name -> last declared by a worker, ms
-- ARGV  1.. names

local now = string.format('%.0f', now_ms())
for _, name in ipairs(ARGV) do
  redis.call('ZADD', KEYS[1], now, name)
end
