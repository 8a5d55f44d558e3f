-- Move one delivered message from the unacknowledged messages to a deferred queue, or back to its own.
--
-- The push happens only if the message is still unacknowledged: after a visibility-timeout restore it is
-- back on its queue, and a push would be a second copy.
--
-- KEYS[1]  hash  unacknowledged messages by delivery tag
-- KEYS[2]  zset  their index by time of delivery
-- KEYS[3]  list  the queue, newest first
-- ARGV[1]  delivery tag; '' when the message was acknowledged before (early ack)
-- ARGV[2]  the message as it shall wait
-- ARGV[3]  most messages the queue may hold; '' for no bound
-- ARGV[4]  LPUSH: it is the newest; RPUSH: it is the next to be taken
-- returns  1 deferred; 0 no longer ours, nothing done; -1 full, nothing done
if ARGV[3] ~= '' and redis.call('LLEN', KEYS[3]) >= tonumber(ARGV[3]) then
  return -1
end
if ARGV[1] == '' then
  redis.call(ARGV[4], KEYS[3], ARGV[2])
  return 1
end
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then
  return 0
end
-- Changes nothing, but after its first write a script is refused no memory: the message has its place already.
redis.call('HDEL', KEYS[1], '')
-- First, because nothing takes back what a script has done before it fails: a push may not be permitted.
redis.call(ARGV[4], KEYS[3], ARGV[2])
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
