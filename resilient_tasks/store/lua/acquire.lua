-- acquire(holder, lease, task, waits, has_room) -> JSON {admitted, trial, snapshot, transition}
-- Ask to make one call; in HALF_OPEN, for a permit of `lease` ms, and where there is a limit, for a slot likewise.
-- KEYS, ARGV 1..4: see state.lua
-- ARGV  5 holder     who asks
--       6 lease      ms
--       7 task       id of a resumed task, for which a slot may be kept; empty for any other
--       8 waits      1: the holder is a task that waits for a slot if it gets none
--       9 has_room   1: whoever asks has room for the call himself
-- Needs rules.lua

load_breaker(true)
local admitted, trial = acquire(ARGV[5], tonumber(ARGV[6]), ARGV[7], ARGV[8] == '1', ARGV[9] == '1')
return answer({ admitted = admitted, trial = trial })
