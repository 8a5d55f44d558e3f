-- record(evidence) -> JSON {snapshot, transition}
-- Count outcomes of calls that needed no permit; open the breaker at the first that trips it.
-- KEYS, ARGV 1..4: see state.lua
-- ARGV  5 evidence   JSON {epoch, runs: [[outcome, count, voter, proxied, each], ...], cause,
--                    causes: {cause: count}, retry_after: ms or absent}
-- Needs rules.lua

local evidence = cjson.decode(ARGV[5])
load_breaker(true)
report(evidence.epoch, evidence.runs, evidence.cause, evidence.retry_after)
return answer()
