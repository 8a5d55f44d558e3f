-- settle(holder, outcome, evidence) -> JSON {snapshot, transition}
-- Count the outcome of a call, and free its permit and its slot; without either nothing.
-- KEYS, ARGV 1..4: see state.lua
-- ARGV  5 holder     of the permit or the slot
--       6 outcome    SUCCESS, FAILURE, SLOW or IGNORED
--       7 evidence   JSON {epoch, runs, cause, retry_after: ms or absent}
-- Needs rules.lua

local evidence = cjson.decode(ARGV[7])
load_breaker(true)
settle(ARGV[5], ARGV[6], evidence)
return answer()
