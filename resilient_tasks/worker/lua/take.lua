-- Take the oldest message of the first queue that has one, and note it as unacknowledged in the same step.
--
-- KEYS[1]     hash  unacknowledged messages by delivery tag
-- KEYS[2]     zset  their index by time of delivery
-- KEYS[3..n]  list  the queues in the order in which they are looked at, newest first
-- ARGV[1]     time of delivery, s
-- returns     the queue's key and the message; nothing if all are empty
local function read(text)
  local readable, message = pcall(cjson.decode, text)
  if not readable then -- Python also reads and writes halves of surrogate pairs
    local without_halves = text:gsub('\\\\', ''):gsub('\\u[dD][89a-fA-F]%x%x', '')
    readable, message = pcall(cjson.decode, without_halves)
  end
  return readable and message
end

local function address_of(text)
  local message = read(text)
  local properties = type(message) == 'table' and message.properties
  local info = type(properties) == 'table' and properties.delivery_info
  if type(info) == 'table' then
    return properties.delivery_tag, info.exchange, info.routing_key
  end
end

-- What has no address cannot be delivered by the worker, noted or not.
local function note(text)
  local tag, exchange, routing_key = address_of(text)
  if type(tag) == 'string' and exchange and routing_key then
    local encodable, address = pcall(cjson.encode, { exchange, routing_key })
    address = encodable and address:sub(2, -2) or 'null,null' -- NaN and Infinity are read, but not written
    redis.call('ZADD', KEYS[2], ARGV[1], tag)
    redis.call('HSET', KEYS[1], tag, '[' .. text .. ',' .. address .. ']')
  end
end

for i = 3, #KEYS do
  -- The first write: after it a script is refused no memory, so a full server still hands out its messages.
  local text = redis.call('RPOP', KEYS[i])
  if text then
    note(text)
    return { KEYS[i], text }
  end
end
return nil
