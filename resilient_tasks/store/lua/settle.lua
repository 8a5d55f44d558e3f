-- settle(holder, outcome, evidence) -> JSON {snapshot, transition}
-- Count the outcome of a call, and free its permit and its slot; without either nothing.
-- KEYS, ARGV 1..4: see state.lua
-- ARGV  5 holder     of the permit or the slot
--       6 outcome    SUCCESS, FAILURE, SLOW or IGNORED
--       7 evidence   JSON {epoch, runs, cause, retry_after: ms or absent}
-- Needs rules.lua

local evidence = cjson.decode(ARGV[7])
load_breaker(true)
if (trials[ARGV[5]] or stragglers[ARGV[5]] or now) > now then
  tally_trial(ARGV[6], evidence.cause)
elseif holds_slot(ARGV[5]) and record.state ~= 'DISABLED' then
  tally_call(ARGV[6], evidence.cause)
end
settle(ARGV[5], ARGV[6], evidence)
return answer()
