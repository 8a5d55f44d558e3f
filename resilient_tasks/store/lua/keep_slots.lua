-- keep_slots(lease, most, task, ...) -> JSON {kept, snapshot, transition}
-- Keep slots for the first of the waiting tasks, which are about to be resumed.
-- KEYS, ARGV 1..4: see state.lua
-- ARGV  5 lease   ms for which a slot is kept
--       6 most    calls that may be in flight by the caller's knowledge
--       7.. ids of tasks in the order in which they wait
-- Needs rules.lua

local tasks = {}
for i = 7, #ARGV do
  tasks[#tasks + 1] = ARGV[i]
end
load_breaker(true)
return answer({ kept = keep_slots(tasks, tonumber(ARGV[5]), tonumber(ARGV[6])) })
