-- abandoned(unseen_for) -> names of breakers that no worker has declared for that long
-- KEYS  1 breakers     sorted set   name -> last declared by a worker, ms
-- ARGV  1 unseen_for   ms

return redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now_ms() - tonumber(ARGV[1])))
