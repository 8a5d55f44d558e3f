-- report_health_check(outcome, limit, evidence) -> JSON {snapshot, transition}
-- Count a health check made while tasks are admitted; `limit` failures in a row open the breaker.
-- KEYS, ARGV 1..4: see state.lua
-- ARGV  5 outcome    SUCCESS or FAILURE
--       6 limit      count
--       7 evidence   JSON {epoch, cause, retry_after: ms or absent}
-- Needs rules.lua

local evidence = cjson.decode(ARGV[7])
load_breaker(true)
report_health_check(evidence.epoch, ARGV[5], tonumber(ARGV[6]), evidence.cause, evidence.retry_after)
return answer()
