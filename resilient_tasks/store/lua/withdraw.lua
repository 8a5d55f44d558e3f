-- withdraw(task_id, keep_for) -> nothing
-- Give the claim of a coalesced task back, unless a later task has made it since.
-- KEYS  1 claim      text   id of the latest task
-- ARGV  1 task_id
--       2 keep_for   ms until then

if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
