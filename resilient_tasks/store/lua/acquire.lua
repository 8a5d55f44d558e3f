-- acquire(holder, lease) -> JSON {admitted, trial, snapshot, transition}
-- Ask to make one call; in HALF_OPEN, for a permit of `lease` ms.
-- KEYS, ARGV 1..4: see state.lua
-- ARGV  5 holder   who asks
--       6 lease    ms

load_breaker(true)
local admitted, trial = acquire(ARGV[5], tonumber(ARGV[6]))
return answer({ admitted = admitted, trial = trial })
